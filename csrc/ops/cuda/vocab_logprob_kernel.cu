#include <cmath>

#include "ops/cuda/vocab_logprob_body.h"
#include "ops/cuda/vocab_logprob_kernel.h"

namespace megatron_rlvr::vocab_logprob::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRowThreads = 128;  // of the kernels with one thread a row

// Registers are bounded so that four blocks share a multiprocessor: enough loads in flight to fill the memory bus.
template <typename T, bool kMoments>
__global__ void __launch_bounds__(kThreads, kMoments ? 2 : 4)
    statistics_kernel(const T* logits, const int64_t* targets, const bool* mask, Shard shard, double* packed) {
  __shared__ Sums shared[kThreads / device::kWarp];
  statistics_body<T, kThreads, kMoments>(logits, targets, mask, shard, packed, shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    gradient_kernel(const T* logits, T* gradient, int64_t gradient_stride, const RowConstants* constants, Shard shard) {
  gradient_body<T, kThreads>(logits, gradient, gradient_stride, constants, shard);
}

template <typename T>
__global__ void row_constants_kernel(const T* logits, const int64_t* targets, const double* saved,
                                     const double* grad_logprobs, const double* grad_entropy, Shard shard,
                                     RowConstants* constants) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < shard.rows) {
    row_constants_body<T>(logits, targets, saved, grad_logprobs, grad_entropy, shard, t, constants);
  }
}

__global__ void combine_splits_kernel(const double* parts, int64_t rows, int splits, int width, double* packed) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < rows) combine_splits_body(parts, t, splits, width, packed);
}

__global__ void merge_kernel(const double* gathered, int64_t ranks, int64_t rows, int width, float* logprobs,
                             float* entropy, double* saved) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < rows) merge_body<float>(gathered, t, ranks, rows, width, logprobs, entropy, saved);
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

unsigned int row_blocks(int64_t rows) {
  return static_cast<unsigned int>((rows + kRowThreads - 1) / kRowThreads);
}

Shard shard_of(const Launch& launch) {
  Shard shard;
  shard.rows = launch.rows;
  shard.columns = static_cast<int>(launch.columns);
  shard.width = static_cast<int>(launch.width);
  shard.stride = launch.stride;
  shard.first_column = launch.first_column;
  shard.splits = launch.splits;
  shard.rate = static_cast<float>(kLog2E / launch.temperature);
  shard.temperature = launch.temperature;
  return shard;
}

template <typename T>
const char* statistics_of(const Launch& launch, const void* logits, const int64_t* targets, const bool* mask,
                          bool moments, double* packed) {
  const auto blocks = static_cast<unsigned int>(launch.rows * launch.splits);
  const T* x = static_cast<const T*>(logits);
  if (moments) {
    statistics_kernel<T, true><<<blocks, kThreads, 0, launch.stream>>>(x, targets, mask, shard_of(launch), packed);
  } else {
    statistics_kernel<T, false><<<blocks, kThreads, 0, launch.stream>>>(x, targets, mask, shard_of(launch), packed);
  }
  return launch_error();
}

template <typename T>
const char* gradient_of_shard(const Launch& launch, const void* logits, const int64_t* targets, const double* saved,
                              const double* grad_logprobs, const double* grad_entropy, RowConstants* constants,
                              void* gradient, int64_t gradient_stride) {
  const T* x = static_cast<const T*>(logits);
  const Shard shard = shard_of(launch);
  row_constants_kernel<T><<<row_blocks(launch.rows), kRowThreads, 0, launch.stream>>>(x, targets, saved, grad_logprobs,
                                                                                      grad_entropy, shard, constants);
  if (const char* error = launch_error()) return error;
  const auto blocks = static_cast<unsigned int>(launch.rows * launch.splits);
  gradient_kernel<T>
      <<<blocks, kThreads, 0, launch.stream>>>(x, static_cast<T*>(gradient), gradient_stride, constants, shard);
  return launch_error();
}

}  // namespace

int splits_for(int64_t rows, int64_t columns, int element_size, int multiprocessors) {
  // Four blocks a multiprocessor fill it; a split of less than 16 KiB is all overhead.
  const int64_t wanted = (4 * static_cast<int64_t>(multiprocessors) + rows - 1) / (rows > 0 ? rows : 1);
  const int64_t most = columns * element_size / 16384;
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int>(splits > 1 ? splits : 1);
}

const char* statistics(const Launch& launch, const void* logits, const int64_t* targets, const bool* mask, bool moments,
                       double* parts, double* packed) {
  if (launch.rows == 0) return nullptr;
  double* out = launch.splits > 1 ? parts : packed;
  const char* error = nullptr;
  switch (launch.element) {
    case Element::kBFloat16:
      error = statistics_of<__nv_bfloat16>(launch, logits, targets, mask, moments, out);
      break;
    case Element::kFloat16:
      error = statistics_of<__half>(launch, logits, targets, mask, moments, out);
      break;
    case Element::kFloat32:
      error = statistics_of<float>(launch, logits, targets, mask, moments, out);
      break;
  }
  if (error || launch.splits == 1) return error;
  combine_splits_kernel<<<row_blocks(launch.rows), kRowThreads, 0, launch.stream>>>(
      parts, launch.rows, launch.splits, moments ? kStatsWithMoments : kStats, packed);
  return launch_error();
}

const char* merge(const double* gathered, int64_t ranks, int64_t rows, int width, float* logprobs, float* entropy,
                  double* saved, cudaStream_t stream) {
  if (rows == 0) return nullptr;
  merge_kernel<<<row_blocks(rows), kRowThreads, 0, stream>>>(gathered, ranks, rows, width, logprobs, entropy, saved);
  return launch_error();
}

int64_t row_constants_size() {
  return sizeof(RowConstants);
}

const char* gradient(const Launch& launch, const void* logits, const int64_t* targets, const double* saved,
                     const double* grad_logprobs, const double* grad_entropy, void* constants, void* gradient,
                     int64_t gradient_stride) {
  if (launch.rows == 0) return nullptr;
  auto* rows = static_cast<RowConstants*>(constants);
  switch (launch.element) {
    case Element::kBFloat16:
      return gradient_of_shard<__nv_bfloat16>(launch, logits, targets, saved, grad_logprobs, grad_entropy, rows,
                                              gradient, gradient_stride);
    case Element::kFloat16:
      return gradient_of_shard<__half>(launch, logits, targets, saved, grad_logprobs, grad_entropy, rows, gradient,
                                       gradient_stride);
    case Element::kFloat32:
      return gradient_of_shard<float>(launch, logits, targets, saved, grad_logprobs, grad_entropy, rows, gradient,
                                      gradient_stride);
  }
  return "unknown element type";
}

}  // namespace megatron_rlvr::vocab_logprob::cuda
