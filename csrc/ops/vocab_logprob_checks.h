// Argument checks of vocab_logprob, the same for every device. Messages name the argument and its value.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "ops/vocab_logprob.h"

namespace megatron_rlvr::vocab_logprob {

inline void check_shard(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& mask,
                        double temperature, int64_t num_columns) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits_TV must have 2 dimensions, got shape ", logits.sizes());
  const auto type = logits.scalar_type();
  TORCH_CHECK_VALUE(type == at::kBFloat16 || type == at::kHalf || type == at::kFloat || type == at::kDouble,
                    "logits_TV must have dtype bfloat16, float16, float32 or float64, got ", type);
  TORCH_CHECK_VALUE(logits.size(1) <= 1 || logits.stride(1) == 1,
                    "logits_TV must have its columns side by side (stride 1), got strides ", logits.strides());
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == logits.size(0), "targets_T must have shape [",
                    logits.size(0), "] like the rows of logits_TV, got ", targets.sizes());
  TORCH_CHECK_VALUE(targets.scalar_type() == at::kLong && targets.is_contiguous(),
                    "targets_T must be a contiguous int64 tensor, got ", targets.scalar_type());
  TORCH_CHECK_VALUE(targets.device() == logits.device(), "targets_T must be on ", logits.device(), ", got ",
                    targets.device());
  if (mask) {
    TORCH_CHECK_VALUE(mask->dim() == 1 && mask->size(0) == logits.size(0) && mask->scalar_type() == at::kBool &&
                          mask->is_contiguous() && mask->device() == logits.device(),
                      "mask_T must be a contiguous bool tensor of shape [", logits.size(0), "] on ", logits.device(),
                      ", got ", mask->scalar_type(), " ", mask->sizes(), " on ", mask->device());
  }
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature > 0.0, "temperature must be finite and above 0, got ",
                    temperature);
  TORCH_CHECK_VALUE(num_columns >= 0 && num_columns <= logits.size(1), "num_columns must be in [0, ", logits.size(1),
                    "], got ", num_columns);
}

inline void check_statistics(const at::Tensor& statistics, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(statistics.dim() == 3 && statistics.size(0) >= 1 && statistics.size(1) == logits.size(0) &&
                        (statistics.size(2) == kStats || statistics.size(2) == kStatsWithMoments),
                    "statistics_RT4 must have shape [ranks, ", logits.size(0), ", ", kStats, " or ", kStatsWithMoments,
                    "], got ", statistics.sizes());
  TORCH_CHECK_VALUE(statistics.scalar_type() == at::kDouble && statistics.device() == logits.device(),
                    "statistics_RT4 must be float64 on ", logits.device(), ", got ", statistics.scalar_type(), " on ",
                    statistics.device());
}

inline void check_upstream(const at::Tensor& logits, const std::optional<at::Tensor>& grad, const char* name) {
  if (!grad) return;
  TORCH_CHECK_VALUE(grad->dim() == 1 && grad->size(0) == logits.size(0) && grad->is_floating_point() &&
                        grad->device() == logits.device(),
                    name, " must be a floating tensor of shape [", logits.size(0), "] on ", logits.device(), ", got ",
                    grad->scalar_type(), " ", grad->sizes(), " on ", grad->device());
}

inline void check_backward(const at::Tensor& logits, const at::Tensor& saved,
                           const std::optional<at::Tensor>& grad_logprobs,
                           const std::optional<at::Tensor>& grad_entropy) {
  TORCH_CHECK_VALUE(saved.dim() == 2 && saved.size(0) == logits.size(0) && saved.size(1) == kSaved &&
                        saved.scalar_type() == at::kDouble && saved.is_contiguous() &&
                        saved.device() == logits.device(),
                    "saved_T3 must be what vocab_logprob_merge returned, [", logits.size(0), ", ", kSaved,
                    "] float64, got ", saved.scalar_type(), " ", saved.sizes());
  check_upstream(logits, grad_logprobs, "grad_logprobs_T");
  check_upstream(logits, grad_entropy, "grad_entropy_T");
}

// A write over the logits needs every element to be in memory once.
inline void check_rows_apart(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1),
                    "logits_TV must have rows that do not overlap to be written in place, got strides ",
                    logits.strides());
}

inline at::Tensor as_doubles(const std::optional<at::Tensor>& grad) {
  return grad ? grad->to(at::kDouble).contiguous() : at::Tensor();
}

}  // namespace megatron_rlvr::vocab_logprob
