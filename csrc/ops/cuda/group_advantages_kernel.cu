#include "ops/cuda/group_advantages_body.h"
#include "ops/cuda/group_advantages_kernel.h"

namespace megatron_rlvr::group_advantages::cuda {

namespace {

constexpr int kGroupThreads = 64;  // few groups: spread over many multiprocessors
constexpr int kThreads = 512;

__global__ void __launch_bounds__(kGroupThreads) group_kernel(Settings settings, Inputs in, const int64_t* start,
                                                              double* scratch, double* advantages, int32_t* outcome) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x;
  if (g < in.num_groups) group_body(settings, in, start, g, scratch, advantages, outcome);
}

__global__ void __launch_bounds__(kThreads) whiten_kernel(Inputs in, double* advantages) {
  __shared__ double shared[kThreads];
  whiten_body<kThreads>(in, advantages, shared);
}

__global__ void __launch_bounds__(kThreads) scale_by_nonzero_kernel(Inputs in, double* advantages) {
  __shared__ double shared[kThreads];
  scale_by_nonzero_body<kThreads>(in, advantages, shared);
}

}  // namespace

void estimate(const Settings& settings, const Inputs& in, const int64_t* start, double* scratch, double* advantages,
              int32_t* outcome, cudaStream_t stream) {
  const int blocks = static_cast<int>((in.num_groups + kGroupThreads - 1) / kGroupThreads);
  group_kernel<<<blocks, kGroupThreads, 0, stream>>>(settings, in, start, scratch, advantages, outcome);
  if (settings.estimator == Estimator::kReinforcePp || settings.estimator == Estimator::kReinforcePpBaseline) {
    whiten_kernel<<<1, kThreads, 0, stream>>>(in, advantages);
  } else if (settings.estimator == Estimator::kGpg) {
    scale_by_nonzero_kernel<<<1, kThreads, 0, stream>>>(in, advantages);
  }
}

}  // namespace megatron_rlvr::group_advantages::cuda
