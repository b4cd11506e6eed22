// The CUDA kernels of vocab_logprob run on the CPU, behind a C interface for tests (tests/unit/csrc). Blocks have few
// threads, so that small rows reach every loop: whole unrolled batches, single vectors, head, tail and both reductions.

#include <cstring>
#include <vector>

#include "ops/cuda/vocab_logprob_body.h"

namespace {

using namespace megatron_rlvr;
using namespace megatron_rlvr::vocab_logprob;
using namespace megatron_rlvr::vocab_logprob::cuda;

constexpr int kThreads = 64;

Shard shard_of(int64_t rows, int64_t columns, int64_t width, int64_t stride, int64_t first_column, int splits,
               double temperature) {
  Shard shard;
  shard.rows = rows;
  shard.columns = static_cast<int>(columns);
  shard.width = static_cast<int>(width);
  shard.stride = stride;
  shard.first_column = first_column;
  shard.splits = splits;
  shard.rate = static_cast<float>(kLog2E / temperature);
  shard.temperature = temperature;
  return shard;
}

template <typename T, bool kMoments>
void run_statistics(const T* logits, const int64_t* targets, const bool* mask, const Shard& shard, double* packed) {
  constexpr int kWidth = kMoments ? kStatsWithMoments : kStats;
  std::vector<double> parts(shard.rows * shard.splits * kWidth, NAN);
  std::vector<Sums> shared(kThreads / device::kWarp);
  device::launch(
      shard.rows * shard.splits, kThreads,
      [&] { statistics_body<T, kThreads, kMoments>(logits, targets, mask, shard, parts.data(), shared.data()); },
      [&] { std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Sums)); });
  if (shard.splits == 1) {
    std::memcpy(packed, parts.data(), parts.size() * sizeof(double));
    return;
  }
  for (int64_t t = 0; t < shard.rows; ++t) combine_splits_body(parts.data(), t, shard.splits, kWidth, packed);
}

template <typename T>
void run_gradient(const T* logits, T* gradient, int64_t gradient_stride, const int64_t* targets, const double* saved,
                  const double* grad_logprobs, const double* grad_entropy, const Shard& shard) {
  std::vector<RowConstants> constants(shard.rows);
  for (int64_t t = 0; t < shard.rows; ++t) {
    row_constants_body<T>(logits, targets, saved, grad_logprobs, grad_entropy, shard, t, constants.data());
  }
  device::launch(
      shard.rows * shard.splits, kThreads,
      [&] { gradient_body<T, kThreads>(logits, gradient, gradient_stride, constants.data(), shard); }, [] {});
}

}  // namespace

extern "C" {

void emulated_statistics(int bf16, const void* logits, const int64_t* targets, const bool* mask, int moments,
                         int64_t rows, int64_t columns, int64_t width, int64_t stride, int64_t first_column, int splits,
                         double temperature, double* packed) {
  const Shard shard = shard_of(rows, columns, width, stride, first_column, splits, temperature);
  if (bf16) {
    const auto* x = static_cast<const device::BFloat16*>(logits);
    moments ? run_statistics<device::BFloat16, true>(x, targets, mask, shard, packed)
            : run_statistics<device::BFloat16, false>(x, targets, mask, shard, packed);
  } else {
    const auto* x = static_cast<const float*>(logits);
    moments ? run_statistics<float, true>(x, targets, mask, shard, packed)
            : run_statistics<float, false>(x, targets, mask, shard, packed);
  }
}

void emulated_merge(const double* gathered, int64_t ranks, int64_t rows, int width, float* logprobs, float* entropy,
                    double* saved) {
  for (int64_t t = 0; t < rows; ++t) merge_body<float>(gathered, t, ranks, rows, width, logprobs, entropy, saved);
}

void emulated_gradient(int bf16, const void* logits, void* gradient, int64_t gradient_stride, const int64_t* targets,
                       const double* saved, const double* grad_logprobs, const double* grad_entropy, int64_t rows,
                       int64_t columns, int64_t width, int64_t stride, int64_t first_column, int splits,
                       double temperature) {
  const Shard shard = shard_of(rows, columns, width, stride, first_column, splits, temperature);
  if (bf16) {
    run_gradient(static_cast<const device::BFloat16*>(logits), static_cast<device::BFloat16*>(gradient),
                 gradient_stride, targets, saved, grad_logprobs, grad_entropy, shard);
  } else {
    run_gradient(static_cast<const float*>(logits), static_cast<float*>(gradient), gradient_stride, targets, saved,
                 grad_logprobs, grad_entropy, shard);
  }
}

}  // extern "C"
