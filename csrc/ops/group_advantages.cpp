// Schema, checks, meta and CPU kernel of the advantages of ragged groups, all estimators in one call.

#include <torch/library.h>

#include "ops/cpu/group_advantages_kernel.h"
#include "ops/group_advantages_checks.h"

namespace megatron_rlvr::group_advantages {

namespace {

at::Tensor advantages_cpu(const at::Tensor& rewards, const at::Tensor& group_sizes, const at::Tensor& rank,
                          const at::Tensor& below, const at::Tensor& fraction, const std::optional<at::Tensor>& valid,
                          const std::optional<at::Tensor>& correctness, const std::optional<at::Tensor>& penalty,
                          const std::optional<at::Tensor>& lengths, int64_t estimator, int64_t std, int64_t mask,
                          double eps, double positive_weight, bool penalty_additive) {
  const at::Tensor out = advantages_meta(rewards, group_sizes, rank, below, fraction, valid, correctness, penalty,
                                         lengths, estimator, std, mask, eps, positive_weight, penalty_additive);
  const Inputs in =
      inputs_of(rewards, group_sizes, rank, below, fraction, valid, correctness, penalty, lengths, penalty_additive);
  check_sizes(in.group_size, in.num_groups, in.num_responses);
  for (int64_t i = 0; in.length && i < in.num_responses; ++i) {
    TORCH_CHECK_VALUE(in.length[i] >= 0, "lengths_N must be 0 or above, got ", in.length[i]);
  }
  const Settings settings{static_cast<Estimator>(estimator), static_cast<Std>(std), static_cast<Mask>(mask), eps,
                          positive_weight};
  check_outcome(cpu::estimate(settings, in, out.mutable_data_ptr<double>()), mask);
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
