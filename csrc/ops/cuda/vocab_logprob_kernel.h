// Launchers of vocab_logprob on raw pointers, without ATen: compiled by nvcc for the device, and by the C++ compiler
// in emulation/ for tests. All pointers are device pointers; every launch is on `stream` and returns an error text,
// or null.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(MEGATRON_RLVR_WITH_CUDA)
#include <cuda_runtime_api.h>
#else
using cudaStream_t = void*;
#endif

namespace megatron_rlvr::vocab_logprob::cuda {

enum class Element { kBFloat16, kFloat16, kFloat32 };

struct Launch {
  Element element;
  int64_t rows;
  int64_t columns;  // that exist
  int64_t width;    // with padded ones
  int64_t stride;   // elements from row to row
  int64_t first_column;
  int splits;  // blocks of a row, from splits_for
  double temperature;
  cudaStream_t stream;
};

// Blocks of a row so that the whole device has work: 1 where there are rows enough.
int splits_for(int64_t rows, int64_t columns, int element_size, int multiprocessors);

// `parts` is scratch of [rows, splits, 4 or 6] doubles where splits > 1, else unused.
const char* statistics(const Launch& launch, const void* logits, const int64_t* targets, const bool* mask, bool moments,
                       double* parts, double* packed);

const char* merge(const double* gathered, int64_t ranks, int64_t rows, int width, float* logprobs, float* entropy,
                  double* saved, cudaStream_t stream);

// Bytes of `constants` a row.
int64_t row_constants_size();

// `gradient` may be `logits`.
const char* gradient(const Launch& launch, const void* logits, const int64_t* targets, const double* saved,
                     const double* grad_logprobs, const double* grad_entropy, void* constants, void* gradient,
                     int64_t gradient_stride);

}  // namespace megatron_rlvr::vocab_logprob::cuda
