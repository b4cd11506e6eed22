// Kernel bodies of group_advantages: a thread a group, then, for estimators that look over groups, one block over all
// responses. Sums are taken in a fixed order.
#pragma once

#include <cstdint>

#include "ops/cuda/device.h"
#include "ops/group_advantages.h"

namespace megatron_rlvr::group_advantages::cuda {

// `start` holds the first response of every group; `scratch` kScratchColumns numbers a response. `outcome` keeps what
// went wrong with any group.
MRLVR_DEVICE void group_body(const Settings& settings, const Inputs& in, const int64_t* start, int64_t g,
                             double* scratch, double* advantages, int32_t* outcome) {
  const Outcome got = estimate_group(settings, in, g, start[g], scratch + kScratchColumns * start[g], advantages);
  if (got != Outcome::kDone) *outcome = static_cast<int32_t>(got);
}

enum class Reduce { kSum, kMin, kMax };

// The same on all threads of the block; `shared` holds kThreads numbers.
template <int kThreads>
MRLVR_DEVICE double over_block(Reduce how, double value, double* shared) {
  const int thread = device::thread_index();
  shared[thread] = value;
  device::sync_threads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      const double a = shared[thread], b = shared[thread + half];
      shared[thread] = how == Reduce::kSum ? a + b : (how == Reduce::kMin) == (b < a) ? b : a;
    }
    device::sync_threads();
  }
  const double result = shared[0];
  device::sync_threads();
  return result;
}

// (x - mean) / sqrt(unbiased variance + 1e-8) over the tokens of all valid responses (E4).
template <int kThreads>
MRLVR_DEVICE void whiten_body(const Inputs& in, double* values, double* shared) {
  const int thread = device::thread_index();
  double tokens = 0.0, sum = 0.0, low = INFINITY, high = -INFINITY;
  for (int64_t i = thread; i < in.num_responses; i += kThreads) {
    if (!is_valid(in, i) || in.length[i] == 0) continue;
    const double length = static_cast<double>(in.length[i]);
    tokens += length;
    sum += length * values[i];
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  tokens = over_block<kThreads>(Reduce::kSum, tokens, shared);
  sum = over_block<kThreads>(Reduce::kSum, sum, shared);
  low = over_block<kThreads>(Reduce::kMin, low, shared);
  high = over_block<kThreads>(Reduce::kMax, high, shared);
  const bool flat = tokens < 2.0 || low == high;
  const double mean = flat ? 0.0 : sum / tokens;
  double squares = 0.0;
  for (int64_t i = thread; i < in.num_responses; i += kThreads) {
    if (is_valid(in, i)) squares += static_cast<double>(in.length[i]) * (values[i] - mean) * (values[i] - mean);
  }
  squares = over_block<kThreads>(Reduce::kSum, squares, shared);
  const double scale = flat ? 1.0 : std::sqrt(squares / (tokens - 1.0) + kWhiteningEps);
  for (int64_t i = thread; i < in.num_responses; i += kThreads) {
    values[i] = !flat && is_valid(in, i) ? (values[i] - mean) / scale : 0.0;
  }
}

// B / number of non-zero rewards, so that responses without reward do not shrink the step.
template <int kThreads>
MRLVR_DEVICE void scale_by_nonzero_body(const Inputs& in, double* values, double* shared) {
  const int thread = device::thread_index();
  double valid = 0.0, nonzero = 0.0;
  for (int64_t i = thread; i < in.num_responses; i += kThreads) {
    valid += is_valid(in, i);
    nonzero += is_valid(in, i) && in.reward[i] != 0.0;
  }
  valid = over_block<kThreads>(Reduce::kSum, valid, shared);
  nonzero = over_block<kThreads>(Reduce::kSum, nonzero, shared);
  const double scale = valid / (nonzero > 1.0 ? nonzero : 1.0);
  for (int64_t i = thread; i < in.num_responses; i += kThreads) values[i] *= scale;
}

}  // namespace megatron_rlvr::group_advantages::cuda
