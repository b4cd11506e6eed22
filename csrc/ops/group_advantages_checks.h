// Argument checks of group_advantages, the same for every device. Messages name the argument and its value.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>

#include "ops/group_advantages.h"

namespace megatron_rlvr::group_advantages {

inline constexpr const char* kMaskNames[] = {"qae", "pos_mask", "neg_mask", "none"};

inline void check(const at::Tensor& tensor, const char* name, int64_t size, at::ScalarType type) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape [", size, "], got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == type, name, " must have dtype ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

inline at::Tensor advantages_meta(const at::Tensor& rewards, const at::Tensor& group_sizes, const at::Tensor& rank,
                                  const at::Tensor& below, const at::Tensor& fraction,
                                  const std::optional<at::Tensor>& valid, const std::optional<at::Tensor>& correctness,
                                  const std::optional<at::Tensor>& penalty, const std::optional<at::Tensor>& lengths,
                                  int64_t estimator, int64_t std, int64_t mask, double, double, bool) {
  TORCH_CHECK_VALUE(rewards.dim() == 1 && group_sizes.dim() == 1,
                    "rewards_N and group_sizes must have 1 dimension, got shapes ", rewards.sizes(), " and ",
                    group_sizes.sizes());
  const int64_t responses = rewards.size(0), groups = group_sizes.size(0);
  check(rewards, "rewards_N", responses, at::kDouble);
  check(group_sizes, "group_sizes", groups, at::kLong);
  check(rank, "rank_P", groups, at::kLong);
  check(below, "below_P", groups, at::kLong);
  check(fraction, "fraction_P", groups, at::kDouble);
  if (valid) check(*valid, "valid_N", responses, at::kBool);
  if (correctness) check(*correctness, "correctness_N", responses, at::kDouble);
  if (penalty) check(*penalty, "penalty_N", responses, at::kDouble);
  if (lengths) check(*lengths, "lengths_N", responses, at::kLong);
  TORCH_CHECK_VALUE(estimator >= 0 && estimator < static_cast<int64_t>(Estimator::kEstimators),
                    "estimator must be in [0, ", static_cast<int64_t>(Estimator::kEstimators), "), got ", estimator);
  TORCH_CHECK_VALUE(std >= 0 && std < static_cast<int64_t>(Std::kStds), "std must be in [0, 3), got ", std);
  TORCH_CHECK_VALUE(mask >= 0 && mask < static_cast<int64_t>(Mask::kMasks), "mask must be in [0, 4), got ", mask);
  const auto kind = static_cast<Estimator>(estimator);
  const bool needs_lengths =
      kind == Estimator::kReinforcePp || kind == Estimator::kReinforcePpBaseline || kind == Estimator::kOpo;
  TORCH_CHECK_VALUE(lengths.has_value() || !needs_lengths, "lengths_N must be given for estimator ", estimator);
  return at::empty_like(rewards);
}

// Group borders must lie inside the responses before a kernel follows them.
inline void check_sizes(const int64_t* group_size, int64_t num_groups, int64_t num_responses) {
  int64_t total = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    TORCH_CHECK_VALUE(group_size[g] >= 0 && group_size[g] <= num_responses - total,
                      "group_sizes must be 0 or above and add up to ", num_responses, ", got ", group_size[g],
                      " for group ", g);
    total += group_size[g];
  }
  TORCH_CHECK_VALUE(total == num_responses, "group_sizes must add up to ", num_responses, ", got ", total);
}

inline void check_outcome(Outcome outcome, int64_t mask) {
  TORCH_CHECK_VALUE(outcome != Outcome::kMoreThanTwoRewards,
                    "mask must be 'qae' where a group has more than two distinct rewards, got '", kMaskNames[mask],
                    "'");
  TORCH_CHECK_VALUE(outcome != Outcome::kBelowOutside,
                    "below_P must be the index of a valid response of its group, got one outside");
}

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

inline Inputs inputs_of(const at::Tensor& rewards, const at::Tensor& group_sizes, const at::Tensor& rank,
                        const at::Tensor& below, const at::Tensor& fraction, const std::optional<at::Tensor>& valid,
                        const std::optional<at::Tensor>& correctness, const std::optional<at::Tensor>& penalty,
                        const std::optional<at::Tensor>& lengths, bool penalty_additive) {
  return {rewards.const_data_ptr<double>(),
          data_or_null<bool>(valid),
          data_or_null<double>(correctness),
          data_or_null<double>(penalty),
          data_or_null<int64_t>(lengths),
          rewards.size(0),
          group_sizes.const_data_ptr<int64_t>(),
          rank.const_data_ptr<int64_t>(),
          below.const_data_ptr<int64_t>(),
          fraction.const_data_ptr<double>(),
          group_sizes.size(0),
          penalty_additive};
}

}  // namespace megatron_rlvr::group_advantages
