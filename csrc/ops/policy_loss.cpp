// Schemas, meta and CPU kernels of the policy losses.
//
//   policy_loss              one pass -> per-token loss, its derivative by log pi, and the sums behind the metrics
//   aggregated_policy_loss   the same with weights of aggregation and importance inside: the fp64 sum over tokens of
//                            weight x importance x loss, its derivative, and the sums; no per-token loss is written
//   ratio_clipped            where the ratio clip decides the loss
//   sequence_logratio        GSPO's mean log ratio of each token's sequence
//
// megatron_rlvr/ops/native_tokens.py registers the autograd formula: the derivative is already there.

#include "ops/policy_loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "ops/cpu/policy_loss_kernel.h"
#include "ops/policy_loss_checks.h"

namespace megatron_rlvr::policy_loss {

namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Result policy_loss_meta(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                        const at::Tensor& mask, const std::optional<at::Tensor>& selected,
                        const std::optional<at::Tensor>& sequence_logratio, int64_t loss, double eps_low,
                        double eps_high, std::optional<double> dual_clip, double clamp, double beta, int64_t kl) {
  check_arguments({logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, std::nullopt, std::nullopt},
                  {loss, kl, eps_low, eps_high, dual_clip, clamp, beta});
  return {at::empty_like(logprobs), at::empty_like(logprobs),
          at::empty({kMetricSums}, logprobs.options().dtype(at::kDouble))};
}

Result aggregated_policy_loss_meta(const at::Tensor& logprobs, const at::Tensor& old_logprobs,
                                   const at::Tensor& advantages, const at::Tensor& mask, const at::Tensor& weights,
                                   const std::optional<at::Tensor>& importance,
                                   const std::optional<at::Tensor>& selected,
                                   const std::optional<at::Tensor>& sequence_logratio, int64_t loss, double eps_low,
                                   double eps_high, std::optional<double> dual_clip, double clamp, double beta,
                                   int64_t kl) {
  check_arguments({logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, weights, importance},
                  {loss, kl, eps_low, eps_high, dual_clip, clamp, beta});
  const auto wide = logprobs.options().dtype(at::kDouble);
  return {at::empty({}, wide), at::empty_like(logprobs), at::empty({kMetricSums}, wide)};
}

// Calls `run` with a zero of the log-probs' type.
template <typename F>
void dispatch(const at::Tensor& logprobs, F&& run) {
  if (logprobs.scalar_type() == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
}

// Slope and sums of checked arguments; per-token losses into `loss` where it is defined.
std::tuple<at::Tensor, at::Tensor> evaluate_on_cpu(const Options& options, const Tensors& in, const at::Tensor& loss) {
  check_arguments(in, options);
  const at::Tensor slope = at::empty_like(in.logprobs);
  const at::Tensor sums = at::empty({kSums}, in.logprobs.options().dtype(at::kDouble));
  dispatch(in.logprobs, [&](auto zero) {
    using T = decltype(zero);
    cpu::evaluate_tokens<T>(settings_of<T>(options), inputs_of<T>(in),
                            loss.defined() ? loss.mutable_data_ptr<T>() : nullptr, slope.mutable_data_ptr<T>(),
                            sums.mutable_data_ptr<double>());
  });
  return {slope, sums};
}

Result policy_loss_cpu(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                       const at::Tensor& mask, const std::optional<at::Tensor>& selected,
                       const std::optional<at::Tensor>& sequence_logratio, int64_t loss_kind, double eps_low,
                       double eps_high, std::optional<double> dual_clip, double clamp, double beta, int64_t kl) {
  const at::Tensor loss = at::empty_like(logprobs);
  const auto [slope, sums] = evaluate_on_cpu(
      {loss_kind, kl, eps_low, eps_high, dual_clip, clamp, beta},
      {logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, std::nullopt, std::nullopt}, loss);
  return {loss, slope, sums.narrow(0, 0, kMetricSums)};
}

Result aggregated_policy_loss_cpu(const at::Tensor& logprobs, const at::Tensor& old_logprobs,
                                  const at::Tensor& advantages, const at::Tensor& mask, const at::Tensor& weights,
                                  const std::optional<at::Tensor>& importance,
                                  const std::optional<at::Tensor>& selected,
                                  const std::optional<at::Tensor>& sequence_logratio, int64_t loss_kind, double eps_low,
                                  double eps_high, std::optional<double> dual_clip, double clamp, double beta,
                                  int64_t kl) {
  const auto [slope, sums] = evaluate_on_cpu(
      {loss_kind, kl, eps_low, eps_high, dual_clip, clamp, beta},
      {logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, weights, importance}, at::Tensor());
  return {sums.select(0, kLossSum).clone(), slope, sums.narrow(0, 0, kMetricSums)};
}

at::Tensor ratio_clipped_meta(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                              const at::Tensor& mask, double eps_low, double eps_high, double clamp) {
  const Options options{static_cast<int64_t>(Loss::kPpo), 0, eps_low, eps_high, std::nullopt, clamp, 0.0};
  check_arguments({logprobs, old_logprobs, advantages, mask, {}, {}, {}, {}}, options);
  return at::empty_like(mask);
}

at::Tensor ratio_clipped_cpu(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                             const at::Tensor& mask, double eps_low, double eps_high, double clamp) {
  const at::Tensor clipped = ratio_clipped_meta(logprobs, old_logprobs, advantages, mask, eps_low, eps_high, clamp);
  const Options options{static_cast<int64_t>(Loss::kPpo), 0, eps_low, eps_high, std::nullopt, clamp, 0.0};
  const Tensors in{logprobs, old_logprobs, advantages, mask, {}, {}, {}, {}};
  dispatch(logprobs, [&](auto zero) {
    using T = decltype(zero);
    cpu::mark_ratio_clipped<T>(settings_of<T>(options), inputs_of<T>(in), clipped.mutable_data_ptr<bool>());
  });
  return clipped;
}

at::Tensor sequence_logratio_meta(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& mask,
                                  const at::Tensor& trajectory) {
  check_sequence_arguments(logprobs, old_logprobs, mask, trajectory);
  return at::empty_like(logprobs);
}

at::Tensor sequence_logratio_cpu(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& mask,
                                 const at::Tensor& trajectory) {
  const at::Tensor out = sequence_logratio_meta(logprobs, old_logprobs, mask, trajectory);
  dispatch(logprobs, [&](auto zero) {
    using T = decltype(zero);
    cpu::sequence_logratios<T>(logprobs.const_data_ptr<T>(), old_logprobs.const_data_ptr<T>(),
                               mask.const_data_ptr<bool>(), trajectory.const_data_ptr<int64_t>(), logprobs.size(0),
                               out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rlvr, m) {
  m.def(
      "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? selected, "
      "Tensor? sequence_logratio, int loss, float eps_low, float eps_high, float? dual_clip, float clamp, float beta, "
      "int kl) -> (Tensor, Tensor, Tensor)");
  m.def(
      "aggregated_policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor weights, "
      "Tensor? importance, Tensor? selected, Tensor? sequence_logratio, int loss, float eps_low, float eps_high, "
      "float? dual_clip, float clamp, float beta, int kl) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ratio_clipped(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, float eps_low, "
      "float eps_high, float clamp) -> Tensor");
  m.def("sequence_logratio(Tensor logprobs, Tensor old_logprobs, Tensor mask, Tensor trajectory) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_rlvr, CPU, m) {
  m.impl("policy_loss", &policy_loss_cpu);
  m.impl("aggregated_policy_loss", &aggregated_policy_loss_cpu);
  m.impl("ratio_clipped", &ratio_clipped_cpu);
  m.impl("sequence_logratio", &sequence_logratio_cpu);
}

TORCH_LIBRARY_IMPL(megatron_rlvr, Meta, m) {
  m.impl("policy_loss", &policy_loss_meta);
  m.impl("aggregated_policy_loss", &aggregated_policy_loss_meta);
  m.impl("ratio_clipped", &ratio_clipped_meta);
  m.impl("sequence_logratio", &sequence_logratio_meta);
}

}  // namespace megatron_rlvr::policy_loss
