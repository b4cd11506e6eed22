// Advantages of one group of responses: scalar mathematics in fp64 (sections A and E4 of the specification), the same
// operations in the same order on the CPU and in a CUDA thread.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MRLVR_HOST_DEVICE __host__ __device__
#else
#define MRLVR_HOST_DEVICE
#endif

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

// The valid responses of one group, end to end. `gate` is what baseline, std and regime are taken of.
struct Group {
  int64_t size;
  double* reward;
  double* gate;
  double* penalty;  // null: none
  double* length;   // null: none
  double* sorted;   // room for `size` numbers
};

MRLVR_HOST_DEVICE inline double mean_of(const double* values, int64_t size) {
  double sum = 0.0;
  for (int64_t i = 0; i < size; ++i) sum += values[i];
  return sum / static_cast<double>(size);
}

MRLVR_HOST_DEVICE inline double spread(const double* values, int64_t size, Std std) {
  const double mean = mean_of(values, size);
  double squares = 0.0;
  for (int64_t i = 0; i < size; ++i) squares += (values[i] - mean) * (values[i] - mean);
  return std::sqrt(squares / static_cast<double>(size - (std == Std::kSample)));
}

struct Range {
  double low;
  double high;
};

// Of one value or more.
MRLVR_HOST_DEVICE inline Range range_of(const double* values, int64_t size) {
  Range range{values[0], values[0]};
  for (int64_t i = 1; i < size; ++i) {
    if (values[i] < range.low) range.low = values[i];
    if (values[i] > range.high) range.high = values[i];
  }
  return range;
}

// Two or more responses that are not all equal; others get explicit zeros, since the rounding of a mean over a tiny
// std would leak advantages (A5).
MRLVR_HOST_DEVICE inline bool has_signal(const double* values, int64_t size) {
  if (size < 2) return false;
  const Range range = range_of(values, size);
  return range.low != range.high;
}

// Heapsort: no recursion and no memory of its own, so that a CUDA thread can do it.
MRLVR_HOST_DEVICE inline void sort(double* values, int64_t size) {
  int64_t unsorted = size;
  for (int64_t first = size / 2; unsorted > 1;) {
    double value;
    if (first > 0) {
      value = values[--first];
    } else {
      value = values[--unsorted];
      values[unsorted] = values[0];
    }
    int64_t hole = first;
    for (int64_t child = 2 * hole + 1; child < unsorted; child = 2 * hole + 1) {
      if (child + 1 < unsorted && values[child] < values[child + 1]) ++child;
      if (!(value < values[child])) break;
      values[hole] = values[child];
      hole = child;
    }
    values[hole] = value;
  }
}

// Whether wrong and right responses keep their advantage (A7).
struct Keep {
  bool wrong;
  bool right;
};

MRLVR_HOST_DEVICE inline Keep keep_of(Mask mask, bool hard) {
  const bool wrong = !hard || mask == Mask::kPosMask || mask == Mask::kNone;
  const bool right = hard || mask == Mask::kNegMask || mask == Mask::kNone;
  return {wrong, right};
}

// False where a mask meets more than two distinct values.
MRLVR_HOST_DEVICE inline bool masked_signs(const Group& group, const Settings& settings, const Level& level,
                                           double* out) {
  const Range range = range_of(group.gate, group.size);
  int64_t num_wrong = 0;
  for (int64_t i = 0; i < group.size; ++i) {
    if (group.gate[i] != range.low && group.gate[i] != range.high) return false;
    num_wrong += group.gate[i] == range.low;
  }
  const Keep keep = keep_of(settings.mask, num_wrong >= level.rank);
  for (int64_t i = 0; i < group.size; ++i) {
    const bool right = group.gate[i] == range.high;
    out[i] = right ? (range.high - range.low) * keep.right : (range.low - range.high) * keep.wrong;
  }
  return true;
}

MRLVR_HOST_DEVICE inline bool qae(const Group& group, const Settings& settings, const Level& level, bool additive,
                                  double* out) {
  if (!has_signal(group.gate, group.size)) return true;
  const double scale = settings.std == Std::kNone ? 1.0 : spread(group.gate, group.size, settings.std) + settings.eps;
  if (settings.mask == Mask::kQae) {
    for (int64_t i = 0; i < group.size; ++i) group.sorted[i] = group.gate[i];
    sort(group.sorted, group.size);
    const int64_t next = level.below + 1 < group.size ? level.below + 1 : group.size - 1;
    const double low = group.sorted[level.below], high = group.sorted[next];
    const double baseline = low + level.fraction * (high - low);
    for (int64_t i = 0; i < group.size; ++i) out[i] = (group.gate[i] - baseline) / scale;
  } else {
    if (!masked_signs(group, settings, level, out)) return false;
    for (int64_t i = 0; i < group.size; ++i) out[i] /= scale;
  }
  if (additive) {
    // The penalty is on the +-1 scale, the correctness on 0/1: half of it (A9).
    for (int64_t i = 0; i < group.size; ++i) out[i] += group.penalty[i] / (2.0 * scale);
  }
  return true;
}

// Writes the advantages of the group's responses into `out`, which holds zeros. False where a mask other than qae
// meets more than two distinct rewards.
MRLVR_HOST_DEVICE inline bool advantages_of(const Group& group, const Settings& settings, const Level& level,
                                            bool additive, double* out) {
  const int64_t size = group.size;
  switch (settings.estimator) {
    case Estimator::kPsr:
    case Estimator::kReinforcePp:
      for (int64_t i = 0; i < size; ++i) out[i] = group.reward[i];
      return true;
    case Estimator::kNsr:
      for (int64_t i = 0; i < size; ++i) out[i] = group.reward[i] - 1.0;
      return true;
    case Estimator::kWReinforce:
      for (int64_t i = 0; i < size; ++i) out[i] = group.reward[i] == 1.0 ? settings.positive_weight : -1.0;
      return true;
    case Estimator::kQae:
      return qae(group, settings, level, additive, out);
    default:
      break;
  }
  if (!has_signal(group.reward, size)) return true;
  double baseline = mean_of(group.reward, size), scale = 1.0;
  if (settings.estimator == Estimator::kGrpo) {
    scale = 1.0 / (spread(group.reward, size, settings.std) + settings.eps);
  } else if (settings.estimator == Estimator::kRloo) {
    scale = static_cast<double>(size) / static_cast<double>(size - 1);
  } else if (settings.estimator == Estimator::kOpo) {
    double tokens = 0.0, weighted = 0.0;
    for (int64_t i = 0; i < size; ++i) {
      tokens += group.length[i];
      weighted += group.length[i] * group.reward[i];
    }
    baseline = weighted / (tokens > 1.0 ? tokens : 1.0);
  }
  for (int64_t i = 0; i < size; ++i) out[i] = (group.reward[i] - baseline) * scale;
  return true;
}

// All groups at once: responses group after group. Null columns are not given.
struct Inputs {
  const double* reward;
  const bool* valid;
  const double* correctness;
  const double* penalty;
  const int64_t* length;
  int64_t num_responses;
  const int64_t* group_size;
  const int64_t* rank;
  const int64_t* below;
  const double* fraction;
  int64_t num_groups;
  bool penalty_additive;
};

MRLVR_HOST_DEVICE inline bool is_valid(const Inputs& in, int64_t i) {
  return !in.valid || in.valid[i];
}

constexpr int kScratchColumns = 6;  // reward, gate, penalty, length, sorted, out

enum class Outcome : int32_t { kDone = 0, kMoreThanTwoRewards, kBelowOutside };

// One group, whose responses begin at `start`: gathers the valid ones into `scratch` (kScratchColumns x the group's
// size), estimates, and writes the advantages of all, 0 for invalid ones.
MRLVR_HOST_DEVICE inline Outcome estimate_group(const Settings& settings, const Inputs& in, int64_t g, int64_t start,
                                                double* scratch, double* advantages) {
  const int64_t room = in.group_size[g];
  Group group{0,
              scratch,
              scratch + room,
              in.penalty ? scratch + 2 * room : nullptr,
              in.length ? scratch + 3 * room : nullptr,
              scratch + 4 * room};
  double* out = scratch + 5 * room;
  for (int64_t i = start; i < start + room; ++i) {
    advantages[i] = 0.0;
    if (!is_valid(in, i)) continue;
    const int64_t at = group.size++;
    group.reward[at] = in.reward[i];
    group.gate[at] = in.correctness ? in.correctness[i] : in.reward[i];
    if (group.penalty) group.penalty[at] = in.penalty[i];
    if (group.length) group.length[at] = static_cast<double>(in.length[i]);
    out[at] = 0.0;
  }
  if (group.size == 0) return Outcome::kDone;
  if (in.below[g] < 0 || in.below[g] >= group.size) return Outcome::kBelowOutside;
  const Level level{in.rank[g], in.below[g], in.fraction[g]};
  if (!advantages_of(group, settings, level, in.penalty && in.penalty_additive, out)) {
    return Outcome::kMoreThanTwoRewards;
  }
  int64_t at = 0;
  for (int64_t i = start; i < start + room; ++i) {
    if (is_valid(in, i)) advantages[i] = out[at++];
  }
  return Outcome::kDone;
}

constexpr double kWhiteningEps = 1e-8;

}  // namespace megatron_rlvr::group_advantages
