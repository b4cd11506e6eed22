// CUDA twin of token_selection: launchers, free of torch's headers. All want at least one entry.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/token_selection.h"

namespace megatron_rlvr::token_selection::cuda {

// Adds to `packed` [kPacked].
template <typename T>
void exact_sums(const T* logprob, const T* advantage, const bool* mask, int64_t num_tokens, int64_t* packed,
                cudaStream_t stream);

// Writes whether each token is a candidate; key and id only where it is masked in.
template <typename T>
void find_candidates(const Rule& rule, const T* logprob, const T* advantage, const bool* mask, const bool* excluded,
                     const int64_t* trajectory, const int64_t* position, int64_t num_tokens, int64_t* key, int64_t* id,
                     bool* candidate, cudaStream_t stream);

// Adds to `counts` [2^bits], at most 2^kMaxDigitBits, as the CPU twin does.
void count_digits(const int64_t* values, int64_t size, uint64_t prefix, int64_t shift, int64_t bits,
                  const int64_t* among, int64_t among_value, int64_t* counts, cudaStream_t stream);

// Marks the candidates whose (key, id) is not above (last_key, last_id).
void mark_up_to(const int64_t* key, const int64_t* id, const int64_t* index, int64_t size, uint64_t last_key,
                uint64_t last_id, bool* selected, cudaStream_t stream);

}  // namespace megatron_rlvr::token_selection::cuda
