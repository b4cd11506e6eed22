// CUDA twin of group_advantages: launcher, free of torch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/group_advantages.h"

namespace megatron_rlvr::group_advantages::cuda {

// Writes `advantages` [in.num_responses]. All arrays are the device's, `start` [in.num_groups] and `scratch`
// [kScratchColumns * in.num_responses] among them; `outcome` holds kDone and keeps what went wrong. Wants a group.
void estimate(const Settings& settings, const Inputs& in, const int64_t* start, double* scratch, double* advantages,
              int32_t* outcome, cudaStream_t stream);

}  // namespace megatron_rlvr::group_advantages::cuda
