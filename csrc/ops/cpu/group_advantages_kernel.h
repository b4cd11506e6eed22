// CPU twin of group_advantages; there is no CUDA twin, since scores are made and used on the host.
#pragma once

#include <cstdint>

#include "ops/group_advantages.h"

namespace megatron_rlvr::group_advantages::cpu {

struct Inputs {
  const double* reward;
  const bool* valid;          // may be null
  const double* correctness;  // may be null: the reward is the gate
  const double* penalty;      // may be null
  const int64_t* length;      // may be null
  int64_t num_responses;
  const int64_t* group_size;
  const int64_t* rank;  // Level of each group
  const int64_t* below;
  const double* fraction;
  int64_t num_groups;
  bool penalty_additive;
};

// Writes the advantages (0 for invalid responses); false where a mask meets more than two distinct rewards.
bool estimate(const Settings& settings, const Inputs& in, double* advantages);

}  // namespace megatron_rlvr::group_advantages::cpu
