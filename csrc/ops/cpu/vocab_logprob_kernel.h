// Row kernels of vocab_logprob on the CPU; one set for each instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "ops/vocab_logprob.h"

namespace megatron_rlvr::vocab_logprob::cpu {

enum class Element { kBFloat16, kFloat16, kFloat32, kFloat64 };

// Statistics of `columns` logits that lie side by side.
using StatisticsRow = Statistics (*)(const void* logits, int64_t columns, double temperature);

// Gradient of a row; `gradient` may be `logits` itself. Does not treat the target apart.
using GradientRow = void (*)(const void* logits, void* gradient, int64_t columns, double temperature,
                             const RowGradient& row);

// The 16-bit element types, as bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct RowKernels {
  const char* name;
  StatisticsRow statistics[4];               // by Element
  StatisticsRow statistics_with_moments[4];  // by Element
  GradientRow gradient[4];                   // by Element
};

const RowKernels& portable_kernels();
#if defined(__x86_64__)
const RowKernels& avx2_kernels();
const RowKernels& avx512_kernels();
#endif

// The kernels in use: the best that this machine runs, unless `select_kernels` named others.
const RowKernels& kernels();

// "portable", "avx2" or "avx512"; false where this machine cannot run it.
bool select_kernels(const char* name);

}  // namespace megatron_rlvr::vocab_logprob::cpu
