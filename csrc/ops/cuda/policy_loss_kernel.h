// CUDA twin of policy_loss: launchers, free of torch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/policy_loss.h"

namespace megatron_rlvr::policy_loss::cuda {

// Blocks that `evaluate_tokens` launches for so many tokens; fixed, so that the order of the sums is.
int num_blocks(int64_t num_tokens);

// Writes loss (where not null) and slope of every token (0 outside the mask) and the kSums sums; the slope carries the
// token's weight and importance, the loss does not. `partial` is scratch of num_blocks x kSums. At least one token.
template <typename T>
void evaluate_tokens(const Settings<T>& settings, const Inputs<T>& in, T* loss, T* slope, double* partial, double* sums,
                     cudaStream_t stream);

// Marks the tokens whose loss the ratio clip decides. At least one token.
template <typename T>
void mark_ratio_clipped(const Settings<T>& settings, const Inputs<T>& in, bool* clipped, cudaStream_t stream);

}  // namespace megatron_rlvr::policy_loss::cuda
