#include "ops/cuda/policy_loss_body.h"
#include "ops/cuda/policy_loss_kernel.h"

namespace megatron_rlvr::policy_loss::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 528;  // four a multiprocessor on the largest devices

// Two blocks a multiprocessor asked for: registers enough for ptxas not to spill.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    evaluate_kernel(Settings<T> settings, Inputs<T> in, T* loss, T* slope, double* partial) {
  __shared__ double shared[kThreads];
  evaluate_body<T, kThreads>(settings, in, gridDim.x, loss, slope, partial, shared);
}

__global__ void finish_kernel(const double* partial, int64_t blocks, double* sums) {
  finish_body(partial, blocks, threadIdx.x, sums);
}

template <typename T>
__global__ void ratio_clipped_kernel(Settings<T> settings, Inputs<T> in, bool* clipped) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < in.num_tokens; t += step) {
    ratio_clipped_body(settings, in, t, clipped);
  }
}

}  // namespace

int num_blocks(int64_t num_tokens) {
  const int64_t blocks = (num_tokens + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

template <typename T>
void evaluate_tokens(const Settings<T>& settings, const Inputs<T>& in, T* loss, T* slope, double* partial, double* sums,
                     cudaStream_t stream) {
  const int blocks = num_blocks(in.num_tokens);
  evaluate_kernel<T><<<blocks, kThreads, 0, stream>>>(settings, in, loss, slope, partial);
  finish_kernel<<<1, kSums, 0, stream>>>(partial, blocks, sums);
}

template <typename T>
void mark_ratio_clipped(const Settings<T>& settings, const Inputs<T>& in, bool* clipped, cudaStream_t stream) {
  ratio_clipped_kernel<T><<<num_blocks(in.num_tokens), kThreads, 0, stream>>>(settings, in, clipped);
}

template void evaluate_tokens<float>(const Settings<float>&, const Inputs<float>&, float*, float*, double*, double*,
                                     cudaStream_t);
template void evaluate_tokens<double>(const Settings<double>&, const Inputs<double>&, double*, double*, double*,
                                      double*, cudaStream_t);
template void mark_ratio_clipped<float>(const Settings<float>&, const Inputs<float>&, bool*, cudaStream_t);
template void mark_ratio_clipped<double>(const Settings<double>&, const Inputs<double>&, bool*, cudaStream_t);

}  // namespace megatron_rlvr::policy_loss::cuda
