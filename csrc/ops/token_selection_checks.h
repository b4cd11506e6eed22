// Argument checks of token_selection, the same for every device. Messages name the argument and its value.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "ops/token_selection.h"

namespace megatron_rlvr::token_selection {

inline void check_entries(const at::Tensor& tensor, const char* name, const at::Tensor& first, at::ScalarType type) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == first.size(0), name, " must have shape [", first.size(0),
                    "] like the first argument, got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == type, name, " must have dtype ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.device() == first.device(), name, " must be on ", first.device(), ", got ", tensor.device());
}

inline void check_tokens(const at::Tensor& logprobs, const at::Tensor& advantages, const at::Tensor& mask) {
  const auto type = logprobs.scalar_type();
  TORCH_CHECK_VALUE(logprobs.dim() == 1, "logprobs_T must have 1 dimension, got shape ", logprobs.sizes());
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble, "logprobs_T must have dtype float32 or float64, got ",
                    type);
  check_entries(logprobs, "logprobs_T", logprobs, type);
  check_entries(advantages, "advantages_T", logprobs, type);
  check_entries(mask, "mask_T", logprobs, at::kBool);
}

inline void check_candidates(const at::Tensor& logprobs, const at::Tensor& advantages, const at::Tensor& mask,
                             const std::optional<at::Tensor>& excluded, const at::Tensor& trajectory,
                             const at::Tensor& position, int64_t method) {
  check_tokens(logprobs, advantages, mask);
  if (excluded) check_entries(*excluded, "excluded_T", logprobs, at::kBool);
  check_entries(trajectory, "trajectory_T", logprobs, at::kLong);
  check_entries(position, "position_T", logprobs, at::kLong);
  TORCH_CHECK_VALUE(method == 0 || method == 1, "method must be 0 (clip_cov) or 1 (kl_cov), got ", method);
}

inline void check_digits(const at::Tensor& values, const std::optional<at::Tensor>& among, int64_t shift,
                         int64_t bits) {
  check_entries(values, "values_C", values, at::kLong);
  if (among) check_entries(*among, "among_C", values, at::kLong);
  TORCH_CHECK_VALUE(bits >= 1 && bits <= kMaxDigitBits, "bits must be in [1, ", kMaxDigitBits, "], got ", bits);
  TORCH_CHECK_VALUE(shift >= 0 && shift + bits <= 64, "shift must be in [0, 64 - bits], got ", shift);
}

inline void check_mark(const at::Tensor& index, const at::Tensor& key, const at::Tensor& id, int64_t num_tokens) {
  check_entries(index, "index_C", index, at::kLong);
  check_entries(key, "key_C", index, at::kLong);
  check_entries(id, "id_C", index, at::kLong);
  TORCH_CHECK_VALUE(num_tokens >= 0, "num_tokens must be 0 or above, got ", num_tokens);
}

}  // namespace megatron_rlvr::token_selection
