// Schemas, meta and CPU kernels of the policy losses.
//
//   policy_loss         one pass -> per-token loss, its derivative by log pi, and the sums behind the metrics
//   ratio_clipped       where the ratio clip decides the loss
//   sequence_logratio   GSPO's mean log ratio of each token's sequence
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
  const Options options{loss, kl, eps_low, eps_high, dual_clip, clamp, beta};
  check_arguments(logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, options);
  return {at::empty_like(logprobs), at::empty_like(logprobs),
          at::empty({kSums}, logprobs.options().dtype(at::kDouble))};
}

template <typename T>
void run_cpu(const Options& options, const at::Tensor& logprobs, const at::Tensor& old_logprobs,
             const at::Tensor& advantages, const at::Tensor& mask, const std::optional<at::Tensor>& selected,
             const std::optional<at::Tensor>& sequence_logratio, Result& result) {
  const Inputs<T> in{logprobs.const_data_ptr<T>(),
                     old_logprobs.const_data_ptr<T>(),
                     advantages.const_data_ptr<T>(),
                     mask.const_data_ptr<bool>(),
                     selected ? selected->const_data_ptr<bool>() : nullptr,
                     sequence_logratio ? sequence_logratio->const_data_ptr<T>() : nullptr,
                     logprobs.size(0)};
  cpu::evaluate_tokens<T>(settings_of<T>(options), in, std::get<0>(result).mutable_data_ptr<T>(),
                          std::get<1>(result).mutable_data_ptr<T>(), std::get<2>(result).mutable_data_ptr<double>());
}

Result policy_loss_cpu(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                       const at::Tensor& mask, const std::optional<at::Tensor>& selected,
                       const std::optional<at::Tensor>& sequence_logratio, int64_t loss, double eps_low,
                       double eps_high, std::optional<double> dual_clip, double clamp, double beta, int64_t kl) {
  Result result = policy_loss_meta(logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, loss, eps_low,
                                   eps_high, dual_clip, clamp, beta, kl);
  const Options options{loss, kl, eps_low, eps_high, dual_clip, clamp, beta};
  if (logprobs.scalar_type() == at::kDouble) {
    run_cpu<double>(options, logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, result);
  } else {
    run_cpu<float>(options, logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, result);
  }
  return result;
}

at::Tensor ratio_clipped_meta(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                              const at::Tensor& mask, double eps_low, double eps_high, double clamp) {
  const Options options{static_cast<int64_t>(Loss::kPpo), 0, eps_low, eps_high, std::nullopt, clamp, 0.0};
  check_arguments(logprobs, old_logprobs, advantages, mask, std::nullopt, std::nullopt, options);
  return at::empty_like(mask);
}

at::Tensor ratio_clipped_cpu(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& advantages,
                             const at::Tensor& mask, double eps_low, double eps_high, double clamp) {
  const at::Tensor clipped = ratio_clipped_meta(logprobs, old_logprobs, advantages, mask, eps_low, eps_high, clamp);
  const Options options{static_cast<int64_t>(Loss::kPpo), 0, eps_low, eps_high, std::nullopt, clamp, 0.0};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Inputs<T> in{logprobs.const_data_ptr<T>(),
                       old_logprobs.const_data_ptr<T>(),
                       advantages.const_data_ptr<T>(),
                       mask.const_data_ptr<bool>(),
                       nullptr,
                       nullptr,
                       logprobs.size(0)};
    cpu::mark_ratio_clipped<T>(settings_of<T>(options), in, clipped.mutable_data_ptr<bool>());
  };
  if (logprobs.scalar_type() == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
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
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cpu::sequence_logratios<T>(logprobs.const_data_ptr<T>(), old_logprobs.const_data_ptr<T>(),
                               mask.const_data_ptr<bool>(), trajectory.const_data_ptr<int64_t>(), logprobs.size(0),
                               out.mutable_data_ptr<T>());
  };
  if (logprobs.scalar_type() == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rlvr, m) {
  m.def(
      "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? selected, "
      "Tensor? sequence_logratio, int loss, float eps_low, float eps_high, float? dual_clip, float clamp, float beta, "
      "int kl) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ratio_clipped(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, float eps_low, "
      "float eps_high, float clamp) -> Tensor");
  m.def("sequence_logratio(Tensor logprobs, Tensor old_logprobs, Tensor mask, Tensor trajectory) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_rlvr, CPU, m) {
  m.impl("policy_loss", &policy_loss_cpu);
  m.impl("ratio_clipped", &ratio_clipped_cpu);
  m.impl("sequence_logratio", &sequence_logratio_cpu);
}

TORCH_LIBRARY_IMPL(megatron_rlvr, Meta, m) {
  m.impl("policy_loss", &policy_loss_meta);
  m.impl("ratio_clipped", &ratio_clipped_meta);
  m.impl("sequence_logratio", &sequence_logratio_meta);
}

}  // namespace megatron_rlvr::policy_loss
