// CUDA entry points of policy_loss.

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "ops/cuda/policy_loss_kernel.h"
#include "ops/policy_loss_checks.h"

namespace megatron_rlvr::policy_loss {

namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Slope and sums of checked arguments; per-token losses into `loss` where it is defined.
std::tuple<at::Tensor, at::Tensor> evaluate_on_device(const Options& options, const Tensors& in,
                                                      const at::Tensor& loss) {
  check_arguments(in, options);
  const c10::cuda::CUDAGuard guard(in.logprobs.device());
  const int64_t num_tokens = in.logprobs.size(0);
  const at::Tensor slope = at::empty_like(in.logprobs);
  const at::Tensor sums = at::zeros({kSums}, in.logprobs.options().dtype(at::kDouble));
  if (num_tokens == 0) return {slope, sums};
  const at::Tensor partial = at::empty({cuda::num_blocks(num_tokens), kSums}, sums.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cuda::evaluate_tokens<T>(settings_of<T>(options), inputs_of<T>(in),
                             loss.defined() ? loss.mutable_data_ptr<T>() : nullptr, slope.mutable_data_ptr<T>(),
                             partial.mutable_data_ptr<double>(), sums.mutable_data_ptr<double>(),
                             c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (in.logprobs.scalar_type() == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return {slope, sums};
}

Result policy_loss_cuda(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                        const at::Tensor& mask, const std::optional<at::Tensor>& selected,
                        const std::optional<at::Tensor>& sequence_logratio, int64_t loss_kind, double eps_low,
                        double eps_high, std::optional<double> dual_clip, double clamp, double beta, int64_t kl) {
  const Options options{loss_kind, kl, eps_low, eps_high, dual_clip, clamp, beta};
  const Tensors in{logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, std::nullopt, std::nullopt};
  const at::Tensor loss = at::empty_like(logprobs);
  const auto [slope, sums] = evaluate_on_device(options, in, loss);
  return {loss, slope, sums.narrow(0, 0, kMetricSums)};
}

Result aggregated_policy_loss_cuda(const at::Tensor& logprobs, const at::Tensor& old_logprobs,
                                   const at::Tensor& advantages, const at::Tensor& mask, const at::Tensor& weights,
                                   const std::optional<at::Tensor>& importance,
                                   const std::optional<at::Tensor>& selected,
                                   const std::optional<at::Tensor>& sequence_logratio, int64_t loss_kind,
                                   double eps_low, double eps_high, std::optional<double> dual_clip, double clamp,
                                   double beta, int64_t kl) {
  const Options options{loss_kind, kl, eps_low, eps_high, dual_clip, clamp, beta};
  const Tensors in{logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, weights, importance};
  const auto [slope, sums] = evaluate_on_device(options, in, at::Tensor());
  return {sums.select(0, kLossSum).clone(), slope, sums.narrow(0, 0, kMetricSums)};
}

at::Tensor ratio_clipped_cuda(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                              const at::Tensor& mask, double eps_low, double eps_high, double clamp) {
  const Options options{static_cast<int64_t>(Loss::kPpo), 0, eps_low, eps_high, std::nullopt, clamp, 0.0};
  const Tensors in{logprobs, old_logprobs, advantages, mask, {}, {}, {}, {}};
  check_arguments(in, options);
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const at::Tensor clipped = at::empty_like(mask);
  if (logprobs.size(0) == 0) return clipped;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cuda::mark_ratio_clipped<T>(settings_of<T>(options), inputs_of<T>(in), clipped.mutable_data_ptr<bool>(),
                                c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (logprobs.scalar_type() == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return clipped;
}

// Composed of torch's own kernels: sequences number in the hundreds, and only GSPO asks.
at::Tensor sequence_logratio_cuda(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& mask,
                                  const at::Tensor& trajectory) {
  check_sequence_arguments(logprobs, old_logprobs, mask, trajectory);
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const at::Tensor logratio =
      at::where(mask, logprobs - old_logprobs, at::zeros({}, logprobs.options())).to(at::kDouble);
  const auto [sequences, index, counts] = at::_unique2(trajectory, /*sorted=*/true, /*return_inverse=*/true);
  const at::Tensor weight = mask.to(at::kDouble);
  const at::Tensor zeros = at::zeros({sequences.size(0)}, logratio.options());
  const at::Tensor mean = zeros.index_add(0, index, logratio) / zeros.index_add(0, index, weight).clamp_min(1.0);
  return (mean.index_select(0, index) * weight).to(logprobs.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_rlvr, CUDA, m) {
  m.impl("policy_loss", &policy_loss_cuda);
  m.impl("aggregated_policy_loss", &aggregated_policy_loss_cuda);
  m.impl("ratio_clipped", &ratio_clipped_cuda);
  m.impl("sequence_logratio", &sequence_logratio_cuda);
}

}  // namespace megatron_rlvr::policy_loss
