#include "ops/cuda/token_selection_body.h"
#include "ops/cuda/token_selection_kernel.h"

namespace megatron_rlvr::token_selection::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1024;

int blocks_for(int64_t size) {
  const int64_t blocks = (size + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ int64_t first_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ int64_t index_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const T* logprob, const T* advantage, const bool* mask, int64_t num_tokens, uint64_t* packed) {
  __shared__ uint64_t shared[kThreads / device::kWarp * kPacked];
  sums_body<T, kThreads>(logprob, advantage, mask, num_tokens, gridDim.x, packed, shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    candidates_kernel(Rule rule, const T* logprob, const T* advantage, const bool* mask, const bool* excluded,
                      const int64_t* trajectory, const int64_t* position, int64_t num_tokens, int64_t* key, int64_t* id,
                      bool* candidate) {
  for (int64_t t = first_index(); t < num_tokens; t += index_step()) {
    candidate_body(rule, logprob, advantage, mask, excluded, trajectory, position, t, key, id, candidate);
  }
}

__global__ void __launch_bounds__(kThreads)
    digits_kernel(const int64_t* values, int64_t size, uint64_t prefix, int64_t shift, int64_t bits,
                  const int64_t* among, int64_t among_value, uint64_t* counts) {
  __shared__ uint32_t shared[1 << kMaxDigitBits];
  digits_body<kThreads>(values, size, gridDim.x, prefix, shift, bits, among, among_value, counts, shared);
}

__global__ void __launch_bounds__(kThreads)
    mark_kernel(const int64_t* key, const int64_t* id, const int64_t* index, int64_t size, uint64_t last_key,
                uint64_t last_id, bool* selected) {
  for (int64_t i = first_index(); i < size; i += index_step()) {
    mark_body(key, id, index, i, last_key, last_id, selected);
  }
}

}  // namespace

template <typename T>
void exact_sums(const T* logprob, const T* advantage, const bool* mask, int64_t num_tokens, int64_t* packed,
                cudaStream_t stream) {
  sums_kernel<T><<<blocks_for(num_tokens), kThreads, 0, stream>>>(logprob, advantage, mask, num_tokens,
                                                                  reinterpret_cast<uint64_t*>(packed));
}

template <typename T>
void find_candidates(const Rule& rule, const T* logprob, const T* advantage, const bool* mask, const bool* excluded,
                     const int64_t* trajectory, const int64_t* position, int64_t num_tokens, int64_t* key, int64_t* id,
                     bool* candidate, cudaStream_t stream) {
  candidates_kernel<T><<<blocks_for(num_tokens), kThreads, 0, stream>>>(
      rule, logprob, advantage, mask, excluded, trajectory, position, num_tokens, key, id, candidate);
}

void count_digits(const int64_t* values, int64_t size, uint64_t prefix, int64_t shift, int64_t bits,
                  const int64_t* among, int64_t among_value, int64_t* counts, cudaStream_t stream) {
  digits_kernel<<<blocks_for(size), kThreads, 0, stream>>>(values, size, prefix, shift, bits, among, among_value,
                                                           reinterpret_cast<uint64_t*>(counts));
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
