// Advantages of one group of responses: scalar mathematics in fp64 (sections A and E4 of the specification).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace megatron_rlvr::group_advantages {

// In the order of megatron_rlvr/ops/native_tokens.py.
enum class Estimator : int64_t {
  kQae = 0,
  kGrpo,
  kDrGrpo,
  kRloo,
  kReinforcePp,
  kReinforcePpBaseline,
  kPsr,
  kNsr,
  kWReinforce,
  kGpg,
  kOpo,
  kEstimators,
};
enum class Std : int64_t { kSample = 0, kPopulation, kNone, kStds };
enum class Mask : int64_t { kQae = 0, kPosMask, kNegMask, kNone, kMasks };

struct Settings {
  Estimator estimator;
  Std std;
  Mask mask;
  double eps;
  double positive_weight;
};

// Where K falls in a group: exact integers made in Python. The baseline is x[below] + fraction (x[below+1] - x[below])
// of the sorted values; `rank` is m = ceil(K G), the regime's threshold.
struct Level {
  int64_t rank;
  int64_t below;
  double fraction;
};

// The valid responses of one group. `gate` is what baseline, std and regime are taken of.
struct Group {
  std::vector<double> reward;
  std::vector<double> gate;
  std::vector<double> penalty;  // empty: none
  std::vector<double> length;   // empty: none
};

inline double mean_of(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

inline double spread(const std::vector<double>& values, Std std) {
  const double mean = mean_of(values);
  double squares = 0.0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return std::sqrt(squares / static_cast<double>(values.size() - (std == Std::kSample)));
}

// Two or more responses that are not all equal; others get explicit zeros, since the rounding of a mean over a tiny
// std would leak advantages (A5).
inline bool has_signal(const std::vector<double>& values) {
  if (values.size() < 2) return false;
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  return *low != *high;
}

// Whether wrong and right responses keep their advantage (A7).
struct Keep {
  bool wrong;
  bool right;
};

inline Keep keep_of(Mask mask, bool hard) {
  const bool wrong = !hard || mask == Mask::kPosMask || mask == Mask::kNone;
  const bool right = hard || mask == Mask::kNegMask || mask == Mask::kNone;
  return {wrong, right};
}

// False where a mask meets more than two distinct values.
inline bool masked_signs(const Group& group, const Settings& settings, const Level& level, std::vector<double>& out) {
  const auto [low_at, high_at] = std::minmax_element(group.gate.begin(), group.gate.end());
  const double low = *low_at, high = *high_at;
  int64_t num_wrong = 0;
  for (const double value : group.gate) {
    if (value != low && value != high) return false;
    num_wrong += value == low;
  }
  const Keep keep = keep_of(settings.mask, num_wrong >= level.rank);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = group.gate[i] == high ? (high - low) * keep.right : (low - high) * keep.wrong;
  }
  return true;
}

inline bool qae(const Group& group, const Settings& settings, const Level& level, bool additive,
                std::vector<double>& out) {
  if (!has_signal(group.gate)) return true;
  const double scale = settings.std == Std::kNone ? 1.0 : spread(group.gate, settings.std) + settings.eps;
  if (settings.mask == Mask::kQae) {
    std::vector<double> sorted = group.gate;
    std::sort(sorted.begin(), sorted.end());
    const auto last = static_cast<int64_t>(sorted.size()) - 1;
    const double low = sorted[level.below], high = sorted[std::min(level.below + 1, last)];
    const double baseline = low + level.fraction * (high - low);
    for (size_t i = 0; i < out.size(); ++i) out[i] = (group.gate[i] - baseline) / scale;
  } else {
    if (!masked_signs(group, settings, level, out)) return false;
    for (double& value : out) value /= scale;
  }
  if (additive) {
    // The penalty is on the +-1 scale, the correctness on 0/1: half of it (A9).
    for (size_t i = 0; i < out.size(); ++i) out[i] += group.penalty[i] / (2.0 * scale);
  }
  return true;
}

// Writes the advantages of the group's responses into `out`, which holds zeros. False where a mask other than qae
// meets more than two distinct rewards.
inline bool advantages_of(const Group& group, const Settings& settings, const Level& level, bool additive,
                          std::vector<double>& out) {
  const size_t size = group.reward.size();
  switch (settings.estimator) {
    case Estimator::kPsr:
    case Estimator::kReinforcePp:
      out = group.reward;
      return true;
    case Estimator::kNsr:
      for (size_t i = 0; i < size; ++i) out[i] = group.reward[i] - 1.0;
      return true;
    case Estimator::kWReinforce:
      for (size_t i = 0; i < size; ++i) out[i] = group.reward[i] == 1.0 ? settings.positive_weight : -1.0;
      return true;
    case Estimator::kQae:
      return qae(group, settings, level, additive, out);
    default:
      break;
  }
  if (!has_signal(group.reward)) return true;
  double baseline = mean_of(group.reward), scale = 1.0;
  if (settings.estimator == Estimator::kGrpo) {
    scale = 1.0 / (spread(group.reward, settings.std) + settings.eps);
  } else if (settings.estimator == Estimator::kRloo) {
    scale = static_cast<double>(size) / static_cast<double>(size - 1);
  } else if (settings.estimator == Estimator::kOpo) {
    double tokens = 0.0, weighted = 0.0;
    for (size_t i = 0; i < size; ++i) {
      tokens += group.length[i];
      weighted += group.length[i] * group.reward[i];
    }
    baseline = weighted / std::max(1.0, tokens);
  }
  for (size_t i = 0; i < size; ++i) out[i] = (group.reward[i] - baseline) * scale;
  return true;
}

}  // namespace megatron_rlvr::group_advantages
