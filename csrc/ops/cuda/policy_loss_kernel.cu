// The grid is fixed and every sum is taken in a fixed order, so that metrics are the same on every run.

#include "ops/cuda/policy_loss_kernel.h"

namespace megatron_rlvr::policy_loss::cuda {

namespace {

constexpr int kThreads = 256;    // with two blocks a multiprocessor asked for, ptxas has registers enough not to spill
constexpr int kMaxBlocks = 528;  // four a multiprocessor on the largest devices

__device__ inline double combine(int64_t sum, double a, double b) {
  return sum == kRatioMax ? fmax(a, b) : a + b;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    evaluate_kernel(Settings<T> settings, Inputs<T> in, T* loss, T* slope, double* partial) {
  double sums[kSums] = {};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < in.num_tokens; t += step) {
    Outcome<T> out;
    if (in.mask[t]) {
      const bool selected = in.selected && in.selected[t];
      const T sequence = in.sequence_logratio ? in.sequence_logratio[t] : T(0);
      out = evaluate(settings, in.logprob[t], in.old_logprob[t], in.advantage[t], selected, sequence);
      add_to_sums(sums, out, selected);
    }
    loss[t] = out.loss;
    slope[t] = out.slope;
  }
  __shared__ double shared[kThreads];
  for (int64_t sum = 0; sum < kSums; ++sum) {
    shared[threadIdx.x] = sums[sum];
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) {
        shared[threadIdx.x] = combine(sum, shared[threadIdx.x], shared[threadIdx.x + half]);
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) partial[blockIdx.x * kSums + sum] = shared[0];
    __syncthreads();
  }
}

// One thread a sum, over the blocks in order.
__global__ void finish_kernel(const double* partial, int num_blocks, double* sums) {
  const int64_t sum = threadIdx.x;
  if (sum >= kSums) return;
  double total = 0.0;
  for (int block = 0; block < num_blocks; ++block) total = combine(sum, total, partial[block * kSums + sum]);
  sums[sum] = total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) ratio_clipped_kernel(Settings<T> settings, Inputs<T> in, bool* clipped) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < in.num_tokens; t += step) {
    bool decided = false;
    if (in.mask[t]) {
      const Outcome<T> out = evaluate(settings, in.logprob[t], in.old_logprob[t], in.advantage[t], false, T(0));
      decided = out.clipped_high || out.clipped_low;
    }
    clipped[t] = decided;
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
  finish_kernel<<<1, 32, 0, stream>>>(partial, blocks, sums);
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
