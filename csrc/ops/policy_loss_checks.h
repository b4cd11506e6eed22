// Argument checks of policy_loss, the same for every device. Messages name the argument and its value.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/policy_loss.h"

namespace megatron_rlvr::policy_loss {

// What decides the loss, as the schema carries it.
struct Options {
  int64_t loss;
  int64_t kl;
  double eps_low;
  double eps_high;
  std::optional<double> dual_clip;
  double clamp;
  double beta;
};

// The tensors of one call.
struct Tensors {
  const at::Tensor& logprobs;
  const at::Tensor& old_logprobs;
  const at::Tensor& advantages;
  const at::Tensor& mask;
  std::optional<at::Tensor> selected;
  std::optional<at::Tensor> sequence_logratio;
  std::optional<at::Tensor> weights;
  std::optional<at::Tensor> importance;
};

template <typename T>
Inputs<T> inputs_of(const Tensors& in) {
  return {in.logprobs.const_data_ptr<T>(),
          in.old_logprobs.const_data_ptr<T>(),
          in.advantages.const_data_ptr<T>(),
          in.mask.const_data_ptr<bool>(),
          in.selected ? in.selected->const_data_ptr<bool>() : nullptr,
          in.sequence_logratio ? in.sequence_logratio->const_data_ptr<T>() : nullptr,
          in.weights ? in.weights->const_data_ptr<T>() : nullptr,
          in.importance ? in.importance->const_data_ptr<T>() : nullptr,
          in.logprobs.size(0)};
}

template <typename T>
Settings<T> settings_of(const Options& o) {
  return {static_cast<Loss>(o.loss),
          static_cast<Kl>(o.kl),
          static_cast<T>(1.0 - o.eps_low),
          static_cast<T>(1.0 + o.eps_high),
          static_cast<T>(o.clamp),
          static_cast<T>(o.beta),
          static_cast<T>(o.dual_clip.value_or(0.0)),
          o.dual_clip.has_value()};
}

inline void check_entries(const at::Tensor& tensor, const char* name, const at::Tensor& logprobs, at::ScalarType type) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == logprobs.size(0), name, " must have shape [",
                    logprobs.size(0), "] like logprobs_T, got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == type, name, " must have dtype ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.device() == logprobs.device(), name, " must be on ", logprobs.device(), ", got ",
                    tensor.device());
}

inline void check_arguments(const Tensors& in, const Options& options) {
  const auto& [logprobs, old_logprobs, advantages, mask, selected, sequence_logratio, weights, importance] = in;
  const auto type = logprobs.scalar_type();
  TORCH_CHECK_VALUE(logprobs.dim() == 1, "logprobs_T must have 1 dimension, got shape ", logprobs.sizes());
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble, "logprobs_T must have dtype float32 or float64, got ",
                    type);
  check_entries(logprobs, "logprobs_T", logprobs, type);
  check_entries(old_logprobs, "old_logprobs_T", logprobs, type);
  check_entries(advantages, "advantages_T", logprobs, type);
  check_entries(mask, "mask_T", logprobs, at::kBool);
  if (selected) check_entries(*selected, "selected_T", logprobs, at::kBool);
  if (sequence_logratio) check_entries(*sequence_logratio, "sequence_logratio_T", logprobs, type);
  if (weights) check_entries(*weights, "weights_T", logprobs, type);
  if (importance) check_entries(*importance, "importance_T", logprobs, type);
  TORCH_CHECK_VALUE(options.loss >= 0 && options.loss <= static_cast<int64_t>(Loss::kCispo),
                    "loss must be in [0, 4], got ", options.loss);
  TORCH_CHECK_VALUE(options.kl >= 0 && options.kl <= static_cast<int64_t>(Kl::kK3), "kl must be in [0, 3], got ",
                    options.kl);
  const auto loss = static_cast<Loss>(options.loss);
  TORCH_CHECK_VALUE((loss == Loss::kGspo) == sequence_logratio.has_value(),
                    "sequence_logratio_T must be given for gspo and for no other loss, got loss ", options.loss);
  TORCH_CHECK_VALUE((loss == Loss::kClipCov || loss == Loss::kKlCov) == selected.has_value(),
                    "selected_T must be given for clip_cov and kl_cov and for no other loss, got loss ", options.loss);
}

inline void check_sequence_arguments(const at::Tensor& logprobs, const at::Tensor& old_logprobs, const at::Tensor& mask,
                                     const at::Tensor& trajectory) {
  const auto type = logprobs.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble, "logprobs_T must have dtype float32 or float64, got ",
                    type);
  check_entries(logprobs, "logprobs_T", logprobs, type);
  check_entries(old_logprobs, "old_logprobs_T", logprobs, type);
  check_entries(mask, "mask_T", logprobs, at::kBool);
  check_entries(trajectory, "trajectory_T", logprobs, at::kLong);
}

}  // namespace megatron_rlvr::policy_loss
