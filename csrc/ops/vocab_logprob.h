// Log-prob and entropy from a vocabulary shard of logits: the scalar mathematics that the CPU and CUDA twins share.
//
// With x the logits, T the temperature and m = max x of the shard, one read gives, per token,
//   sum = S = sum e^((x-m)/T),   weighted = W = sum (x-m)/T e^((x-m)/T),
// and, when asked, the second moments Q = sum e^(2(x-m)/T), U = sum (x-m)/T e^(2(x-m)/T).
// Shards merge by D2 of the specification; then log pi = (x_t - M)/T - log S and H = log S - W/S.
// Sums of a row are held in fp64 from the second level on: an entropy gradient's row sums to zero only as well as
// W/S is known, and its norm may be a thousandth of W/S.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MRLVR_HOST_DEVICE __host__ __device__
#else
#define MRLVR_HOST_DEVICE
#endif

namespace megatron_rlvr::vocab_logprob {

// Columns of the packed statistics, fp64 [T, kStats] (or kStatsWithMoments); logits already divided by T.
constexpr int kStats = 4;             // max, sum, weighted, target logit (or -inf)
constexpr int kStatsWithMoments = 6;  // and Q, U
// Columns of what backward needs of a row, fp64 [T, kSaved].
constexpr int kSaved = 3;  // M, log S, W/S

// Statistics of a part of a row about the shift `max`, in units of raw logits (not divided by T).
struct Statistics {
  double max = -INFINITY;
  double sum = 0.0;
  double weighted = 0.0;
  double sum2 = 0.0;
  double weighted2 = 0.0;
};

// The statistics about a higher shift: x - m' = (x - m) + (m - m').
MRLVR_HOST_DEVICE inline void raise_shift(Statistics& s, double max, double inverse_temperature) {
  if (s.max == max) return;
  // Nothing was summed below -inf; and -inf - -inf would be NaN.
  if (s.max > -INFINITY) {
    const double offset = s.max - max;
    const double factor = exp(offset * inverse_temperature);
    s.weighted = factor * (s.weighted + offset * s.sum);
    s.sum = factor * s.sum;
    s.weighted2 = factor * factor * (s.weighted2 + offset * s.sum2);
    s.sum2 = factor * factor * s.sum2;
  }
  s.max = max;
}

// a <- a and b together. NaN sums stay NaN, so that a NaN logit is noticed at the end.
MRLVR_HOST_DEVICE inline void merge(Statistics& a, Statistics b, double inverse_temperature) {
  const double max = a.max > b.max ? a.max : b.max;
  raise_shift(a, max, inverse_temperature);
  raise_shift(b, max, inverse_temperature);
  a.sum += b.sum;
  a.weighted += b.weighted;
  a.sum2 += b.sum2;
  a.weighted2 += b.weighted2;
}

// One shard's packed row, from statistics in units of raw logits.
MRLVR_HOST_DEVICE inline void write_statistics(double* row, const Statistics& s, double target, double temperature,
                                               bool moments) {
  row[0] = s.max / temperature;
  row[1] = s.sum;
  row[2] = s.weighted / temperature;
  row[3] = target / temperature;
  if (moments) {
    row[4] = s.sum2;
    row[5] = s.weighted2 / temperature;
  }
}

// A masked row counts as one certain token, on the first shard: log-prob and entropy are 0.
MRLVR_HOST_DEVICE inline void write_masked(double* row, int64_t width, bool first_shard) {
  for (int64_t i = 0; i < width; ++i) row[i] = 0.0;
  row[0] = row[3] = first_shard ? 0.0 : -static_cast<double>(INFINITY);
  row[1] = first_shard ? 1.0 : 0.0;
  if (width > kStats) row[4] = row[1];
}

// A row of all shards together, in nats.
struct Merged {
  double max;      // M
  double log_sum;  // log S
  double mean;     // W/S, the mean of (x - M)/T under the policy
  double logprob;
  double entropy;
};

// Merges a row's packed statistics in rank order: the same additions on every rank, so bitwise equal results.
// `packed` is the first rank's row; the next rank's lies `rank_stride` further.
MRLVR_HOST_DEVICE inline Merged merge_ranks(const double* packed, int64_t ranks, int64_t rank_stride) {
  Statistics all;
  double target = -INFINITY;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const double max = packed[rank * rank_stride];
    all.max = max > all.max ? max : all.max;
  }
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const double* row = packed + rank * rank_stride;
    Statistics shard;
    shard.max = row[0];
    shard.sum = row[1];
    shard.weighted = row[2];
    merge(all, shard, 1.0);
    target = row[3] > target ? row[3] : target;
  }
  Merged merged;
  merged.max = all.max;
  merged.log_sum = log(all.sum);
  merged.mean = all.weighted / all.sum;
  merged.logprob = (target - all.max) - merged.log_sum;
  merged.entropy = merged.log_sum - merged.mean;
  return merged;
}

// What the backward of one row needs: dL/dx_j = e_j (intercept + slope d_j), d_j = x_j - shift, e_j = e^(d_j/T), but
// dL/dx_t = target_gradient at the target. `shift` and `slope` are values of the type that the row is computed in.
struct RowGradient {
  double shift;
  double slope;
  double intercept;
  double target_gradient;
};

// Constants of dL/dx_j = (1/T) (g_lp (1{j=t} - p_j) - g_H p_j (log p_j + H)) (specification D1) for rows computed in
// Real. `max`, `log_sum` and `mean` are M, log S and W/S; `target` is x_t / T.
//
// log p_j + H = (x_j - M)/T - W/S, so the row sums to zero up to the rounding of W/S. The intercept is therefore
// computed from the slope as rounded, and stays in fp64: fp32 rows add it in two parts, the low one multiplied by
// e_j first, so that its digits are not lost to the grid of the larger one.
template <typename Real>
MRLVR_HOST_DEVICE inline RowGradient row_gradient(double max, double log_sum, double mean, double target,
                                                  double grad_logprob, double grad_entropy, double temperature) {
  RowGradient row;
  const double raw_max = max * temperature;
  row.shift = static_cast<Real>(raw_max);
  // Rounding may have moved the shift away from M; the sum about it is S e^moved.
  const double moved = (raw_max - row.shift) / temperature;
  const double inverse_sum = exp(-(log_sum + moved));
  const double g_logprob = grad_logprob / temperature;
  const double g_entropy = grad_entropy / temperature;
  row.slope = static_cast<Real>(-g_entropy / temperature * inverse_sum);
  row.intercept = -g_logprob * inverse_sum - row.slope * ((mean + moved) * temperature);
  const double logprob = (target - max) - log_sum;
  const double p = exp(logprob);
  // 1 - p by expm1 keeps its digits where p is near 1, and p log p is 0 at p = 0.
  row.target_gradient = g_logprob * -expm1(logprob) - (p > 0.0 ? g_entropy * p * ((target - max) - mean) : 0.0);
  return row;
}

}  // namespace megatron_rlvr::vocab_logprob
