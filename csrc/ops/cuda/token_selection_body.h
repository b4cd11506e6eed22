// Kernel bodies of token_selection. Everything that is added up is an integer, so that no order matters.
#pragma once

#include <cstdint>

#include "ops/cuda/atomics.h"
#include "ops/cuda/device.h"
#include "ops/token_selection.h"

namespace megatron_rlvr::token_selection::cuda {

// Two's complement: adding as unsigned is adding as signed.
MRLVR_DEVICE void add_signed(uint64_t* counter, int64_t value) {
  if (value != 0) device::atomic_add(counter, static_cast<uint64_t>(value));
}

MRLVR_DEVICE void add_double(uint64_t* limbs, double value) {
  const Pieces pieces = split(value);
  for (int i = 0; i < 3; ++i) add_signed(limbs + pieces.limb + i, pieces.piece[i]);
}

// Adds this block's tokens to `packed`. `shared` holds one copy of the sums per warp, since neighbouring tokens hit the
// same few limbs.
template <typename T, int kThreads>
MRLVR_DEVICE void sums_body(const T* logprob, const T* advantage, const bool* mask, int64_t num_tokens, int64_t blocks,
                            uint64_t* packed, uint64_t* shared) {
  constexpr int kWarps = kThreads / device::kWarp;
  const int thread = device::thread_index();
  for (int64_t i = thread; i < kWarps * kPacked; i += kThreads) shared[i] = 0;
  device::sync_threads();
  uint64_t* mine = shared + thread / device::kWarp * kPacked;
  int64_t tokens = 0, bad = 0;
  for (int64_t t = device::block_index() * kThreads + thread; t < num_tokens; t += blocks * kThreads) {
    if (!mask[t]) continue;
    ++tokens;
    const double lp = static_cast<double>(logprob[t]), adv = static_cast<double>(advantage[t]);
    const double product = lp * adv;
    if (!is_finite(lp) || !is_finite(adv) || !is_finite(product)) {
      ++bad;
      continue;
    }
    add_double(mine + 2, lp);
    add_double(mine + 2 + kLimbs, adv);
    add_double(mine + 2 + 2 * kLimbs, product);
  }
  add_signed(mine, tokens);
  add_signed(mine + 1, bad);
  device::sync_threads();
  for (int64_t i = thread; i < kPacked; i += kThreads) {
    uint64_t total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp * kPacked + i];
    if (total != 0) device::atomic_add(packed + i, total);
  }
}

template <typename T>
MRLVR_DEVICE void candidate_body(const Rule& rule, const T* logprob, const T* advantage, const bool* mask,
                                 const bool* excluded, const int64_t* trajectory, const int64_t* position, int64_t t,
                                 int64_t* key, int64_t* id, bool* candidate) {
  candidate[t] = false;
  if (!mask[t]) return;
  const uint64_t token = token_id(trajectory[t], position[t]);
  uint64_t token_key = 0;
  candidate[t] = candidate_key(rule, static_cast<double>(logprob[t]), static_cast<double>(advantage[t]),
                               excluded && excluded[t], token, &token_key);
  key[t] = static_cast<int64_t>(token_key);
  id[t] = static_cast<int64_t>(token);
}

// Adds this block's digits to `counts`; `shared` holds 2^bits numbers.
template <int kThreads>
MRLVR_DEVICE void digits_body(const int64_t* values, int64_t size, int64_t blocks, uint64_t prefix, int64_t shift,
                              int64_t bits, const int64_t* among, int64_t among_value, uint64_t* counts,
                              uint32_t* shared) {
  const int thread = device::thread_index();
  const int num_digits = 1 << bits;
  for (int i = thread; i < num_digits; i += kThreads) shared[i] = 0;
  device::sync_threads();
  for (int64_t i = device::block_index() * kThreads + thread; i < size; i += blocks * kThreads) {
    if (among && among[i] != among_value) continue;
    const auto value = static_cast<uint64_t>(values[i]);
    if (has_prefix(value, prefix, shift, bits)) device::atomic_add(shared + digit(value, shift, bits), uint32_t{1});
  }
  device::sync_threads();
  for (int i = thread; i < num_digits; i += kThreads) {
    if (shared[i]) device::atomic_add(counts + i, uint64_t{shared[i]});
  }
}

MRLVR_DEVICE void mark_body(const int64_t* key, const int64_t* id, const int64_t* index, int64_t i, uint64_t last_key,
                            uint64_t last_id, bool* selected) {
  const auto k = static_cast<uint64_t>(key[i]);
  if (k < last_key || (k == last_key && static_cast<uint64_t>(id[i]) <= last_id)) selected[index[i]] = true;
}

}  // namespace megatron_rlvr::token_selection::cuda
