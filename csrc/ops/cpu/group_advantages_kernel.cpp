#include "ops/cpu/group_advantages_kernel.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace megatron_rlvr::group_advantages::cpu {

namespace {

// (x - mean) / sqrt(unbiased variance + 1e-8) over the tokens of all valid responses (E4).
void whiten(const Inputs& in, double* values) {
  double tokens = 0.0, sum = 0.0;
  double low = 0.0, high = 0.0;
  bool first = true;
  for (int64_t i = 0; i < in.num_responses; ++i) {
    if (!is_valid(in, i) || in.length[i] == 0) continue;
    const auto length = static_cast<double>(in.length[i]);
    tokens += length;
    sum += length * values[i];
    low = first ? values[i] : std::min(low, values[i]);
    high = first ? values[i] : std::max(high, values[i]);
    first = false;
  }
  if (tokens < 2.0 || low == high) {
    std::fill(values, values + in.num_responses, 0.0);
    return;
  }
  const double mean = sum / tokens;
  double squares = 0.0;
  for (int64_t i = 0; i < in.num_responses; ++i) {
    if (is_valid(in, i)) squares += static_cast<double>(in.length[i]) * (values[i] - mean) * (values[i] - mean);
  }
  const double scale = std::sqrt(squares / (tokens - 1.0) + kWhiteningEps);
  for (int64_t i = 0; i < in.num_responses; ++i) values[i] = is_valid(in, i) ? (values[i] - mean) / scale : 0.0;
}

// B / number of non-zero rewards, so that responses without reward do not shrink the step.
void scale_by_nonzero(const Inputs& in, double* values) {
  int64_t valid = 0, nonzero = 0;
  for (int64_t i = 0; i < in.num_responses; ++i) {
    valid += is_valid(in, i);
    nonzero += is_valid(in, i) && in.reward[i] != 0.0;
  }
  const double scale = static_cast<double>(valid) / static_cast<double>(std::max<int64_t>(1, nonzero));
  for (int64_t i = 0; i < in.num_responses; ++i) values[i] *= scale;
}

}  // namespace

Outcome estimate(const Settings& settings, const Inputs& in, double* advantages) {
  std::vector<double> scratch;
  int64_t start = 0;
  for (int64_t g = 0; g < in.num_groups; start += in.group_size[g], ++g) {
    scratch.resize(kScratchColumns * in.group_size[g]);
    const Outcome outcome = estimate_group(settings, in, g, start, scratch.data(), advantages);
    if (outcome != Outcome::kDone) return outcome;
  }
  if (settings.estimator == Estimator::kReinforcePp || settings.estimator == Estimator::kReinforcePpBaseline) {
    whiten(in, advantages);
  } else if (settings.estimator == Estimator::kGpg) {
    scale_by_nonzero(in, advantages);
  }
  return Outcome::kDone;
}

}  // namespace megatron_rlvr::group_advantages::cpu
