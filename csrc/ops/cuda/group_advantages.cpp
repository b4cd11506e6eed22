// CUDA entry point of group_advantages.

#include <ATen/core/Tensor.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops/cuda/group_advantages_kernel.h"
#include "ops/group_advantages_checks.h"

namespace megatron_rlvr::group_advantages {

namespace {

void check_device(const std::optional<at::Tensor>& tensor, const char* name, const at::Tensor& rewards) {
  TORCH_CHECK_VALUE(!tensor || tensor->device() == rewards.device(), name, " must be on ", rewards.device(), ", got ",
                    tensor->device());
}

// What describes the groups may lie on the host, where it is made; columns of responses lie with the rewards.
at::Tensor advantages_cuda(const at::Tensor& rewards, const at::Tensor& group_sizes, const at::Tensor& rank,
                           const at::Tensor& below, const at::Tensor& fraction, const std::optional<at::Tensor>& valid,
                           const std::optional<at::Tensor>& correctness, const std::optional<at::Tensor>& penalty,
                           const std::optional<at::Tensor>& lengths, int64_t estimator, int64_t std, int64_t mask,
                           double eps, double positive_weight, bool penalty_additive) {
  const at::Tensor out = advantages_meta(rewards, group_sizes, rank, below, fraction, valid, correctness, penalty,
                                         lengths, estimator, std, mask, eps, positive_weight, penalty_additive);
  check_device(valid, "valid_N", rewards);
  check_device(correctness, "correctness_N", rewards);
  check_device(penalty, "penalty_N", rewards);
  check_device(lengths, "lengths_N", rewards);
  const at::Tensor host_sizes = group_sizes.cpu();
  check_sizes(host_sizes.const_data_ptr<int64_t>(), host_sizes.size(0), rewards.size(0));
  if (rewards.size(0) == 0) return out;
  if (lengths) {
    const auto shortest = lengths->min().item<int64_t>();
    TORCH_CHECK_VALUE(shortest >= 0, "lengths_N must be 0 or above, got ", shortest);
  }
  const c10::cuda::CUDAGuard guard(rewards.device());
  const at::Tensor start = host_sizes.cumsum(0).sub(host_sizes).to(rewards.device());
  const at::Tensor sizes = host_sizes.to(rewards.device()), rank_here = rank.to(rewards.device());
  const at::Tensor below_here = below.to(rewards.device()), fraction_here = fraction.to(rewards.device());
  const at::Tensor scratch = at::empty({kScratchColumns * rewards.size(0)}, rewards.options());
  const at::Tensor outcome = at::zeros({1}, rewards.options().dtype(at::kInt));
  const Inputs in = inputs_of(rewards, sizes, rank_here, below_here, fraction_here, valid, correctness, penalty,
                              lengths, penalty_additive);
  const Settings settings{static_cast<Estimator>(estimator), static_cast<Std>(std), static_cast<Mask>(mask), eps,
                          positive_weight};
  cuda::estimate(settings, in, start.const_data_ptr<int64_t>(), scratch.mutable_data_ptr<double>(),
                 out.mutable_data_ptr<double>(), outcome.mutable_data_ptr<int32_t>(),
                 c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  check_outcome(static_cast<Outcome>(outcome.item<int32_t>()), mask);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_rlvr, CUDA, m) {
  m.impl("group_advantages", &advantages_cuda);
}

}  // namespace megatron_rlvr::group_advantages
