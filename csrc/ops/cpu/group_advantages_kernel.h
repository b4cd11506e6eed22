// CPU kernel of group_advantages.
#pragma once

#include "ops/group_advantages.h"

namespace megatron_rlvr::group_advantages::cpu {

// Writes `advantages` [in.num_responses]. Group sizes add up to the responses.
Outcome estimate(const Settings& settings, const Inputs& in, double* advantages);

}  // namespace megatron_rlvr::group_advantages::cpu
