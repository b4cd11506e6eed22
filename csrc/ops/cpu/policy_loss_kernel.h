// CPU twin of policy_loss.
#pragma once

#include <cstdint>

#include "ops/policy_loss.h"

namespace megatron_rlvr::policy_loss::cpu {

// Writes loss (where not null) and slope of every token (0 outside the mask) and the kSums sums. The slope carries the
// token's weight and importance, the loss does not.
template <typename T>
void evaluate_tokens(const Settings<T>& settings, const Inputs<T>& in, T* loss, T* slope, double* sums);

// Marks the tokens whose loss the ratio clip decides.
template <typename T>
void mark_ratio_clipped(const Settings<T>& settings, const Inputs<T>& in, bool* clipped);

// Writes the mean log ratio of each masked token's sequence (0 outside the mask). A sequence's sum is taken in token
// order in fp64.
template <typename T>
void sequence_logratios(const T* logprob, const T* old_logprob, const bool* mask, const int64_t* trajectory,
                        int64_t num_tokens, T* out);

}  // namespace megatron_rlvr::policy_loss::cpu
