// Schema, checks, meta and CPU kernel of the advantages of ragged groups, all estimators in one call.

#include "ops/group_advantages.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops/cpu/group_advantages_kernel.h"

namespace megatron_rlvr::group_advantages {

namespace {

constexpr const char* kMaskNames[] = {"qae", "pos_mask", "neg_mask", "none"};

void check(const at::Tensor& tensor, const char* name, int64_t size, at::ScalarType type) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape [", size, "], got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == type, name, " must have dtype ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

at::Tensor advantages_meta(const at::Tensor& rewards, const at::Tensor& group_sizes, const at::Tensor& rank,
                           const at::Tensor& below, const at::Tensor& fraction, const std::optional<at::Tensor>& valid,
                           const std::optional<at::Tensor>& correctness, const std::optional<at::Tensor>& penalty,
                           const std::optional<at::Tensor>& lengths, int64_t estimator, int64_t std, int64_t mask,
                           double, double, bool) {
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

// Group borders and order statistics must lie inside their arrays before a kernel follows them.
void check_levels(const cpu::Inputs& in) {
  int64_t total = 0;
  for (int64_t g = 0; g < in.num_groups; ++g) {
    TORCH_CHECK_VALUE(in.group_size[g] >= 0 && in.group_size[g] <= in.num_responses - total,
                      "group_sizes must be 0 or above and add up to ", in.num_responses, ", got ", in.group_size[g],
                      " for group ", g);
    int64_t members = 0;
    for (int64_t i = total; i < total + in.group_size[g]; ++i) members += !in.valid || in.valid[i];
    TORCH_CHECK_VALUE(in.below[g] >= 0 && (members == 0 || in.below[g] < members), "below_P must be in [0, ", members,
                      "), got ", in.below[g], " for group ", g);
    total += in.group_size[g];
  }
  TORCH_CHECK_VALUE(total == in.num_responses, "group_sizes must add up to ", in.num_responses, ", got ", total);
  for (int64_t i = 0; in.length && i < in.num_responses; ++i) {
    TORCH_CHECK_VALUE(in.length[i] >= 0, "lengths_N must be 0 or above, got ", in.length[i]);
  }
}

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

at::Tensor advantages_cpu(const at::Tensor& rewards, const at::Tensor& group_sizes, const at::Tensor& rank,
                          const at::Tensor& below, const at::Tensor& fraction, const std::optional<at::Tensor>& valid,
                          const std::optional<at::Tensor>& correctness, const std::optional<at::Tensor>& penalty,
                          const std::optional<at::Tensor>& lengths, int64_t estimator, int64_t std, int64_t mask,
                          double eps, double positive_weight, bool penalty_additive) {
  const at::Tensor out = advantages_meta(rewards, group_sizes, rank, below, fraction, valid, correctness, penalty,
                                         lengths, estimator, std, mask, eps, positive_weight, penalty_additive);
  const cpu::Inputs in{rewards.const_data_ptr<double>(),
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
  check_levels(in);
  const Settings settings{static_cast<Estimator>(estimator), static_cast<Std>(std), static_cast<Mask>(mask), eps,
                          positive_weight};
  TORCH_CHECK_VALUE(cpu::estimate(settings, in, out.mutable_data_ptr<double>()),
                    "mask must be 'qae' where a group has more than two distinct rewards, got '", kMaskNames[mask],
                    "'");
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rlvr, m) {
  m.def(
      "group_advantages(Tensor rewards, Tensor group_sizes, Tensor rank, Tensor below, Tensor fraction, Tensor? valid, "
      "Tensor? correctness, Tensor? penalty, Tensor? lengths, int estimator, int std, int mask, float eps, "
      "float positive_weight, bool penalty_additive) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_rlvr, CPU, m) {
  m.impl("group_advantages", &advantages_cpu);
}

TORCH_LIBRARY_IMPL(megatron_rlvr, Meta, m) {
  m.impl("group_advantages", &advantages_meta);
}

}  // namespace megatron_rlvr::group_advantages
