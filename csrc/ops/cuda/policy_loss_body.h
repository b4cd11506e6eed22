// Kernel bodies of policy_loss. The grid is fixed and every sum is taken in a fixed order, so that metrics are the same
// on every run.
#pragma once

#include <cstdint>

#include "ops/cuda/device.h"
#include "ops/policy_loss.h"

namespace megatron_rlvr::policy_loss::cuda {

MRLVR_DEVICE double combine(int64_t sum, double a, double b) {
  return sum == kRatioMax ? (a > b ? a : b) : a + b;
}

// Writes the tokens of this block (t = block, block + blocks, ... in units of kThreads) and its row of `partial`
// [blocks, kSums]; `shared` holds kThreads numbers.
template <typename T, int kThreads>
MRLVR_DEVICE void evaluate_body(const Settings<T>& settings, const Inputs<T>& in, int64_t blocks, T* loss, T* slope,
                                double* partial, double* shared) {
  const int thread = device::thread_index();
  double sums[kSums] = {};
  for (int64_t t = device::block_index() * kThreads + thread; t < in.num_tokens; t += blocks * kThreads) {
    Outcome<T> out;
    double scale = 0.0;
    if (in.mask[t]) {
      const bool selected = in.selected && in.selected[t];
      const T sequence = in.sequence_logratio ? in.sequence_logratio[t] : T(0);
      out = evaluate(settings, in.logprob[t], in.old_logprob[t], in.advantage[t], selected, sequence);
      scale = scale_of(in, t);
      add_to_sums(sums, out, selected, scale);
    }
    if (loss) loss[t] = out.loss;
    slope[t] = static_cast<T>(scale * static_cast<double>(out.slope));
  }
  for (int64_t sum = 0; sum < kSums; ++sum) {
    shared[thread] = sums[sum];
    device::sync_threads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (thread < half) shared[thread] = combine(sum, shared[thread], shared[thread + half]);
      device::sync_threads();
    }
    if (thread == 0) partial[device::block_index() * kSums + sum] = shared[0];
    device::sync_threads();
  }
}

// One sum, over the blocks in order.
MRLVR_DEVICE void finish_body(const double* partial, int64_t blocks, int64_t sum, double* sums) {
  double total = 0.0;
  for (int64_t block = 0; block < blocks; ++block) total = combine(sum, total, partial[block * kSums + sum]);
  sums[sum] = total;
}

template <typename T>
MRLVR_DEVICE void ratio_clipped_body(const Settings<T>& settings, const Inputs<T>& in, int64_t t, bool* clipped) {
  clipped[t] = false;
  if (!in.mask[t]) return;
  const Outcome<T> out = evaluate(settings, in.logprob[t], in.old_logprob[t], in.advantage[t], false, T(0));
  clipped[t] = out.clipped_high || out.clipped_low;
}

}  // namespace megatron_rlvr::policy_loss::cuda
