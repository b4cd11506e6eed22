#include "ops/cpu/token_selection_kernel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <mutex>

namespace megatron_rlvr::token_selection::cpu {

namespace {

constexpr int64_t kBlock = 1 << 15;

using Limbs = std::array<int64_t, kLimbs>;

inline void add(Limbs& limbs, double value) {
  const Pieces pieces = split(value);
  limbs[pieces.limb] += pieces.piece[0];
  limbs[pieces.limb + 1] += pieces.piece[1];
  limbs[pieces.limb + 2] += pieces.piece[2];
}

}  // namespace

template <typename T>
void exact_sums(const T* logprob, const T* advantage, const bool* mask, int64_t num_tokens, int64_t* packed) {
  std::fill(packed, packed + kPacked, 0);
  std::mutex guard;
  at::parallel_for(0, num_tokens, kBlock, [&](int64_t begin, int64_t end) {
    int64_t tokens = 0, bad = 0;
    std::array<Limbs, 3> sums{};
    for (int64_t t = begin; t < end; ++t) {
      if (!mask[t]) continue;
      ++tokens;
      const auto lp = static_cast<double>(logprob[t]), adv = static_cast<double>(advantage[t]);
      const double product = lp * adv;
      if (!is_finite(lp) || !is_finite(adv) || !is_finite(product)) {
        ++bad;
        continue;
      }
      add(sums[0], lp);
      add(sums[1], adv);
      add(sums[2], product);
    }
    // Integers: the order of the threads does not matter.
    const std::lock_guard<std::mutex> lock(guard);
    packed[0] += tokens;
    packed[1] += bad;
    for (int64_t s = 0; s < 3; ++s) {
      for (int64_t i = 0; i < kLimbs; ++i) packed[2 + s * kLimbs + i] += sums[s][i];
    }
  });
}

template <typename T>
Candidates find_candidates(const Rule& rule, const T* logprob, const T* advantage, const bool* mask,
                           const bool* excluded, const int64_t* trajectory, const int64_t* position,
                           int64_t num_tokens) {
  const int64_t num_blocks = (num_tokens + kBlock - 1) / kBlock;
  std::vector<Candidates> parts(num_blocks);
  at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      Candidates& part = parts[block];
      const int64_t end = std::min(num_tokens, (block + 1) * kBlock);
      for (int64_t t = block * kBlock; t < end; ++t) {
        if (!mask[t]) continue;
        const uint64_t id = token_id(trajectory[t], position[t]);
        uint64_t key = 0;
        if (!candidate_key(rule, static_cast<double>(logprob[t]), static_cast<double>(advantage[t]),
                           excluded && excluded[t], id, &key)) {
          continue;
        }
        part.index.push_back(t);
        part.key.push_back(static_cast<int64_t>(key));
        part.id.push_back(static_cast<int64_t>(id));
      }
    }
  });
  Candidates all;
  size_t size = 0;
  for (const Candidates& part : parts) size += part.index.size();
  for (auto* column : {&all.index, &all.key, &all.id}) column->reserve(size);
  for (const Candidates& part : parts) {
    all.index.insert(all.index.end(), part.index.begin(), part.index.end());
    all.key.insert(all.key.end(), part.key.begin(), part.key.end());
    all.id.insert(all.id.end(), part.id.begin(), part.id.end());
  }
  return all;
}

void count_digits(const int64_t* values, int64_t size, uint64_t prefix, int64_t shift, int64_t bits,
                  const int64_t* among, int64_t among_value, int64_t* counts) {
  const int64_t num_digits = int64_t{1} << bits;
  std::mutex guard;
  at::parallel_for(0, size, kBlock, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> local(num_digits);
    for (int64_t i = begin; i < end; ++i) {
      const auto value = static_cast<uint64_t>(values[i]);
      if (among && among[i] != among_value) continue;
      if (has_prefix(value, prefix, shift, bits)) ++local[digit(value, shift, bits)];
    }
    const std::lock_guard<std::mutex> lock(guard);
    for (int64_t d = 0; d < num_digits; ++d) counts[d] += local[d];
  });
}

void mark_up_to(const int64_t* key, const int64_t* id, const int64_t* index, int64_t size, uint64_t last_key,
                uint64_t last_id, bool* selected) {
  at::parallel_for(0, size, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto k = static_cast<uint64_t>(key[i]);
      if (k < last_key || (k == last_key && static_cast<uint64_t>(id[i]) <= last_id)) selected[index[i]] = true;
    }
  });
}

template void exact_sums<float>(const float*, const float*, const bool*, int64_t, int64_t*);
template void exact_sums<double>(const double*, const double*, const bool*, int64_t, int64_t*);
template Candidates find_candidates<float>(const Rule&, const float*, const float*, const bool*, const bool*,
                                           const int64_t*, const int64_t*, int64_t);
template Candidates find_candidates<double>(const Rule&, const double*, const double*, const bool*, const bool*,
                                            const int64_t*, const int64_t*, int64_t);

}  // namespace megatron_rlvr::token_selection::cpu
