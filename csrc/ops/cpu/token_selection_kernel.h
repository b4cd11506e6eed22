// CPU twin of token_selection.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/token_selection.h"

namespace megatron_rlvr::token_selection::cpu {

// Candidates in token order.
struct Candidates {
  std::vector<int64_t> index;
  std::vector<int64_t> key;  // bits of the unsigned key
  std::vector<int64_t> id;
};

// Writes kPacked numbers.
template <typename T>
void exact_sums(const T* logprob, const T* advantage, const bool* mask, int64_t num_tokens, int64_t* packed);

template <typename T>
Candidates find_candidates(const Rule& rule, const T* logprob, const T* advantage, const bool* mask,
                           const bool* excluded, const int64_t* trajectory, const int64_t* position,
                           int64_t num_tokens);

// Adds to `counts` [2^bits] the digits of the values that have the prefix and, where `among` is given, whose entry
// there equals `among_value`.
void count_digits(const int64_t* values, int64_t size, uint64_t prefix, int64_t shift, int64_t bits,
                  const int64_t* among, int64_t among_value, int64_t* counts);

// Marks the candidates whose (key, id) is not above (last_key, last_id).
void mark_up_to(const int64_t* key, const int64_t* id, const int64_t* index, int64_t size, uint64_t last_key,
                uint64_t last_id, bool* selected);

}  // namespace megatron_rlvr::token_selection::cpu
