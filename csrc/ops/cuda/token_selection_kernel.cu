// Everything that is added up is an integer, so that no order matters.

#include "ops/cuda/token_selection_kernel.h"

namespace megatron_rlvr::token_selection::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = 1024;

using Counter = unsigned long long;

int blocks_for(int64_t size) {
  const int64_t blocks = (size + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ inline int64_t first_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline int64_t index_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// Two's complement: adding as unsigned is adding as signed.
__device__ inline void add_signed(Counter* counter, int64_t value) {
  if (value != 0) atomicAdd(counter, static_cast<Counter>(value));
}

__device__ inline void add_double(Counter* limbs, double value) {
  const Pieces pieces = split(value);
  for (int i = 0; i < 3; ++i) add_signed(limbs + pieces.limb + i, pieces.piece[i]);
}

// A copy of the sums per warp, since neighbouring tokens hit the same few limbs.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const T* logprob, const T* advantage, const bool* mask, int64_t num_tokens, Counter* packed) {
  __shared__ Counter shared[kWarps][kPacked];
  for (int64_t i = threadIdx.x; i < kWarps * kPacked; i += blockDim.x) shared[i / kPacked][i % kPacked] = 0;
  __syncthreads();
  Counter* mine = shared[threadIdx.x / 32];
  int64_t tokens = 0, bad = 0;
  for (int64_t t = first_index(); t < num_tokens; t += index_step()) {
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
  __syncthreads();
  for (int64_t i = threadIdx.x; i < kPacked; i += blockDim.x) {
    Counter total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp][i];
    if (total != 0) atomicAdd(packed + i, total);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    keys_kernel(Rule rule, const T* logprob, const T* advantage, const bool* mask, const bool* ratio_clipped,
                const int64_t* trajectory, const int64_t* position, int64_t num_tokens, int64_t* key, int64_t* id,
                bool* candidate) {
  for (int64_t t = first_index(); t < num_tokens; t += index_step()) {
    bool chosen = false;
    if (mask[t]) {
      const uint64_t token = token_id(trajectory[t], position[t]);
      uint64_t token_key = 0;
      chosen = candidate_key(rule, static_cast<double>(logprob[t]), static_cast<double>(advantage[t]),
                             ratio_clipped && ratio_clipped[t], token, &token_key);
      key[t] = static_cast<int64_t>(token_key);
      id[t] = static_cast<int64_t>(token);
    }
    candidate[t] = chosen;
  }
}

__global__ void __launch_bounds__(kThreads)
    digits_kernel(const int64_t* values, int64_t size, uint64_t prefix, int64_t shift, int64_t bits,
                  const int64_t* among, int64_t among_value, Counter* counts) {
  __shared__ unsigned int shared[1 << kMaxDigitBits];
  const int num_digits = 1 << bits;
  for (int i = threadIdx.x; i < num_digits; i += blockDim.x) shared[i] = 0;
  __syncthreads();
  for (int64_t i = first_index(); i < size; i += index_step()) {
    if (among && among[i] != among_value) continue;
    const auto value = static_cast<uint64_t>(values[i]);
    if (has_prefix(value, prefix, shift, bits)) atomicAdd(shared + digit(value, shift, bits), 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_digits; i += blockDim.x) {
    if (shared[i]) atomicAdd(counts + i, static_cast<Counter>(shared[i]));
  }
}

__global__ void __launch_bounds__(kThreads)
    mark_kernel(const int64_t* key, const int64_t* id, const int64_t* index, int64_t size, uint64_t last_key,
                uint64_t last_id, bool* selected) {
  for (int64_t i = first_index(); i < size; i += index_step()) {
    const auto k = static_cast<uint64_t>(key[i]);
    if (k < last_key || (k == last_key && static_cast<uint64_t>(id[i]) <= last_id)) selected[index[i]] = true;
  }
}

}  // namespace

template <typename T>
void exact_sums(const T* logprob, const T* advantage, const bool* mask, int64_t num_tokens, int64_t* packed,
                cudaStream_t stream) {
  sums_kernel<T><<<blocks_for(num_tokens), kThreads, 0, stream>>>(logprob, advantage, mask, num_tokens,
                                                                  reinterpret_cast<Counter*>(packed));
}

template <typename T>
void find_candidates(const Rule& rule, const T* logprob, const T* advantage, const bool* mask,
                     const bool* ratio_clipped, const int64_t* trajectory, const int64_t* position, int64_t num_tokens,
                     int64_t* key, int64_t* id, bool* candidate, cudaStream_t stream) {
  keys_kernel<T><<<blocks_for(num_tokens), kThreads, 0, stream>>>(rule, logprob, advantage, mask, ratio_clipped,
                                                                  trajectory, position, num_tokens, key, id, candidate);
}

void count_digits(const int64_t* values, int64_t size, uint64_t prefix, int64_t shift, int64_t bits,
                  const int64_t* among, int64_t among_value, int64_t* counts, cudaStream_t stream) {
  digits_kernel<<<blocks_for(size), kThreads, 0, stream>>>(values, size, prefix, shift, bits, among, among_value,
                                                           reinterpret_cast<Counter*>(counts));
}

void mark_up_to(const int64_t* key, const int64_t* id, const int64_t* index, int64_t size, uint64_t last_key,
                uint64_t last_id, bool* selected, cudaStream_t stream) {
  mark_kernel<<<blocks_for(size), kThreads, 0, stream>>>(key, id, index, size, last_key, last_id, selected);
}

template void exact_sums<float>(const float*, const float*, const bool*, int64_t, int64_t*, cudaStream_t);
template void exact_sums<double>(const double*, const double*, const bool*, int64_t, int64_t*, cudaStream_t);
template void find_candidates<float>(const Rule&, const float*, const float*, const bool*, const bool*, const int64_t*,
                                     const int64_t*, int64_t, int64_t*, int64_t*, bool*, cudaStream_t);
template void find_candidates<double>(const Rule&, const double*, const double*, const bool*, const bool*,
                                      const int64_t*, const int64_t*, int64_t, int64_t*, int64_t*, bool*, cudaStream_t);

}  // namespace megatron_rlvr::token_selection::cuda
