// Kernel bodies of vocab_logprob on CUDA, compiled by nvcc and, through emulation/, for the CPU.
//
// A row is read by one block, or by several (splits) where rows are few; each thread takes 16 bytes at a time and
// keeps its own sums about its own shift. Exponentials are in base 2: with c = log2(e)/T rounded to fp32 once,
// y = c x - shift is one fused operation, rounded relative to y alone, so a common offset of the logits costs nothing.
// Shifts are whole numbers: sums move to a higher shift by an exact power of two.
#pragma once

#include <cstdint>

#include "ops/cuda/device.h"
#include "ops/vocab_logprob.h"

namespace megatron_rlvr::vocab_logprob::cuda {

using device::Vector;
using device::Words;

// 16-byte loads of a thread in flight before the first is used.
constexpr int kUnroll = 4;
// The shift before anything was seen: far below any, yet its difference to another is a number.
constexpr float kNoShift = -1e30f;
// y below this has e = 0 in fp32; the clamp keeps e * y from being 0 * -inf where x = -inf.
constexpr float kLowest = -150.0f;
constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// Which part of a [rows, stride] shard a launch works on.
struct Shard {
  int64_t rows;
  int columns;     // that exist; padded ones beyond are left out
  int width;       // with the padded ones
  int64_t stride;  // elements from row to row
  int64_t first_column;
  int splits;  // blocks of a row
  float rate;  // log2(e) / temperature
  double temperature;
};

// Sums of a thread, then of a block, about the whole-number shift `shift`, in base-2 units.
struct Sums {
  float max;    // largest logit
  float shift;  // at least c * max, a whole number
  double sum;
  double weighted;
  double sum2;
  double weighted2;
};

MRLVR_DEVICE Sums no_sums() {
  return {-INFINITY, kNoShift, 0.0, 0.0, 0.0, 0.0};
}

// Moves sums about a.shift to `shift`, not lower: x 2^(a.shift - shift), exact.
template <bool kMoments>
MRLVR_DEVICE void raise(Sums& a, float shift) {
  const float offset = a.shift - shift;
  const float factor = device::exp2_approx(device::max_nan(offset, kLowest));
  a.weighted = factor * (a.weighted + offset * a.sum);
  a.sum = factor * a.sum;
  if (kMoments) {
    a.weighted2 = factor * (factor * (a.weighted2 + offset * a.sum2));
    a.sum2 = factor * (factor * a.sum2);
  }
  a.shift = shift;
}

MRLVR_DEVICE float shift_of(float max, float rate) {
  return device::max_nan(ceilf(max * rate), kNoShift);
}

// Adds kCount logits, of which `top` is the largest (or NaN).
template <int kCount, bool kMoments>
MRLVR_DEVICE void add(Sums& sums, const float* x, float top, float rate) {
  if (!(top <= sums.max)) {
    sums.max = top;
    const float shift = shift_of(top, rate);
    if (!(shift <= sums.shift)) raise<kMoments>(sums, shift);
  }
  float sum = 0.0f, weighted = 0.0f, sum2 = 0.0f, weighted2 = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float y = device::max_nan(device::fused(x[i], rate, -sums.shift), kLowest);
    const float e = device::exp2_approx(y);
    sum += e;
    weighted = device::fused(e, y, weighted);
    if (kMoments) {
      sum2 = device::fused(e, e, sum2);
      weighted2 = device::fused(e * e, y, weighted2);
    }
  }
  sums.sum += sum;
  sums.weighted += weighted;
  if (kMoments) {
    sums.sum2 += sum2;
    sums.weighted2 += weighted2;
  }
}

// The sums of all threads of a block, in thread 0. `shared` holds one entry a warp.
template <int kThreads, bool kMoments>
MRLVR_DEVICE Sums reduce_block(Sums sums, Sums* shared) {
  auto reduce = [&](int lanes) {
    float top = sums.max, shift = sums.shift;
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      top = device::max_nan(top, device::shuffle_xor(top, mask));
      shift = device::max_nan(shift, device::shuffle_xor(shift, mask));
    }
    raise<kMoments>(sums, shift);
    sums.max = top;
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      sums.sum += device::shuffle_xor(sums.sum, mask);
      sums.weighted += device::shuffle_xor(sums.weighted, mask);
      if (kMoments) {
        sums.sum2 += device::shuffle_xor(sums.sum2, mask);
        sums.weighted2 += device::shuffle_xor(sums.weighted2, mask);
      }
    }
  };
  constexpr int kWarps = kThreads / device::kWarp;
  static_assert(kThreads % device::kWarp == 0 && (kWarps & (kWarps - 1)) == 0 && kWarps <= device::kWarp);
  reduce(device::kWarp);
  const int warp = device::thread_index() / device::kWarp, lane = device::thread_index() % device::kWarp;
  if (lane == 0) shared[warp] = sums;
  device::sync_threads();
  if (warp == 0) {
    sums = lane < kWarps ? shared[lane] : no_sums();
    reduce(kWarps > 1 ? kWarps : 1);
  }
  return sums;
}

// The part of a row that a block works on: elements before the first 16-byte boundary, whole vectors, the rest.
template <typename T>
struct Part {
  static constexpr int kElements = 4 * Words<T>::kElements;  // of a vector

  int head;                      // elements before the vectors; split 0 takes them
  int first_vector, end_vector;  // of this split
  int tail;                      // first element after the vectors; the last split takes the rest

  MRLVR_DEVICE Part(const T* row, int columns, int split, int splits) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Vector)) / int{sizeof(T)};
    head = misaligned ? kElements - misaligned : 0;
    head = head < columns ? head : columns;
    const int64_t vectors = (columns - head) / kElements;
    first_vector = static_cast<int>(vectors * split / splits);
    end_vector = static_cast<int>(vectors * (split + 1) / splits);
    tail = head + static_cast<int>(vectors) * kElements;
    if (split != 0) head = 0;
    if (split != splits - 1) tail = columns;
  }
  // The first vector's first element.
  MRLVR_DEVICE static int start(const T* row, int columns) { return Part(row, columns, 0, 1).head; }
};

// One block: statistics of a split of a row. Packed as vocab_logprob.h says, one row for every (row, split).
template <typename T, int kThreads, bool kMoments>
MRLVR_DEVICE void statistics_body(const T* logits, const int64_t* targets, const bool* mask, const Shard& shard,
                                  double* packed, Sums* shared) {
  constexpr int kWidth = kMoments ? kStatsWithMoments : kStats;
  constexpr int kElements = Part<T>::kElements;
  const int64_t t = device::block_index() / shard.splits;
  const int split = static_cast<int>(device::block_index() % shard.splits);
  const int thread = device::thread_index();
  double* out = packed + device::block_index() * kWidth;
  if (mask && !mask[t]) {
    // The same for all threads: no barrier is skipped by some.
    if (thread == 0) write_masked(out, kWidth, shard.first_column == 0 && split == 0);
    return;
  }
  const T* row = logits + t * shard.stride;
  const Part<T> part(row, shard.columns, split, shard.splits);
  const T* vectors = row + Part<T>::start(row, shard.columns);
  Sums sums = no_sums();
  int v = part.first_vector + thread;
  for (; v + (kUnroll - 1) * kThreads < part.end_vector; v += kUnroll * kThreads) {
    Vector loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = device::load_vector(vectors + (v + u * kThreads) * kElements);
    uint32_t top = loaded[0].word[0];
#pragma unroll
    for (int i = 1; i < 4 * kUnroll; ++i) top = Words<T>::max(top, loaded[i / 4].word[i % 4]);
    float tops[2];
    Words<T>::unpack(top, tops);
    const float largest = Words<T>::kElements == 2 ? device::max_nan(tops[0], tops[1]) : tops[0];
    float x[kUnroll * kElements];
#pragma unroll
    for (int i = 0; i < 4 * kUnroll; ++i) Words<T>::unpack(loaded[i / 4].word[i % 4], x + i * Words<T>::kElements);
    add<kUnroll * kElements, kMoments>(sums, x, largest, shard.rate);
  }
  for (; v < part.end_vector; v += kThreads) {
    const Vector loaded = device::load_vector(vectors + v * kElements);
    float x[kElements];
#pragma unroll
    for (int i = 0; i < 4; ++i) Words<T>::unpack(loaded.word[i], x + i * Words<T>::kElements);
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < kElements; ++i) largest = device::max_nan(largest, x[i]);
    add<kElements, kMoments>(sums, x, largest, shard.rate);
  }
  for (int i = thread; i < part.head; i += kThreads) {
    const float x = Words<T>::one(row + i);
    add<1, kMoments>(sums, &x, x, shard.rate);
  }
  for (int i = part.tail + thread; i < shard.columns; i += kThreads) {
    const float x = Words<T>::one(row + i);
    add<1, kMoments>(sums, &x, x, shard.rate);
  }
  sums = reduce_block<kThreads, kMoments>(sums, shared);
  if (thread != 0) return;
  // From base 2 about `shift` to e about the maximum: y = y' + (c max - shift), e = e' 2^(c max - shift).
  const double rate = shard.rate;
  const bool empty = !(sums.max > -INFINITY) && !(sums.max != sums.max);
  const double moved = empty ? 0.0 : rate * sums.max - sums.shift;
  const double factor = exp2(-moved);
  Statistics s;
  s.max = sums.max;
  s.sum = sums.sum * factor;
  const double to_raw = 1.0 / rate;
  s.weighted = (sums.weighted - moved * sums.sum) * factor * to_raw;
  if (kMoments) {
    s.sum2 = sums.sum2 * factor * factor;
    s.weighted2 = (sums.weighted2 - moved * sums.sum2) * factor * factor * to_raw;
  }
  const int64_t column = targets[t] - shard.first_column;
  const bool local = split == 0 && column >= 0 && column < shard.columns;
  write_statistics(out, s, local ? static_cast<double>(Words<T>::one(row + column)) : -INFINITY, shard.temperature,
                   kMoments);
}

// One thread a row: merges what the splits of a row packed.
MRLVR_DEVICE void combine_splits_body(const double* parts, int64_t t, int splits, int width, double* packed) {
  Statistics all;
  double target = -INFINITY;
  const double* part = parts + t * splits * width;
  for (int split = 0; split < splits; ++split, part += width) {
    Statistics s;
    s.max = part[0];
    s.sum = part[1];
    s.weighted = part[2];
    if (width > kStats) {
      s.sum2 = part[4];
      s.weighted2 = part[5];
    }
    merge(all, s, 1.0);
    target = part[3] > target ? part[3] : target;
  }
  write_statistics(packed + t * width, all, target, 1.0, width > kStats);
}

// One thread a row: merges the ranks. A row that has no finite normaliser gives NaN: a device cannot raise.
template <typename Output>
MRLVR_DEVICE void merge_body(const double* gathered, int64_t t, int64_t ranks, int64_t rows, int width,
                             Output* logprobs, Output* entropy, double* saved) {
  const Merged merged = merge_ranks(gathered + t * width, ranks, rows * width);
  const bool good = merged.max > -INFINITY && merged.max < INFINITY && merged.log_sum < INFINITY;
  logprobs[t] = static_cast<Output>(good ? merged.logprob : NAN);
  entropy[t] = static_cast<Output>(good ? merged.entropy : NAN);
  saved[t * kSaved] = merged.max;
  saved[t * kSaved + 1] = merged.log_sum;
  saved[t * kSaved + 2] = merged.mean;
}

// What the gradient kernel needs of a row, in base-2 units: dL/dx_j = e_j (high + slope y_j + low).
struct RowConstants {
  float shift;
  float slope;
  float high;
  float low;
  float target_gradient;
  int skip;        // both upstream gradients are 0: the row's gradient is 0, its logits need not be read
  int64_t column;  // of the target in this shard, or -1
};

// One thread a row.
template <typename T>
MRLVR_DEVICE void row_constants_body(const T* logits, const int64_t* targets, const double* saved,
                                     const double* grad_logprobs, const double* grad_entropy, const Shard& shard,
                                     int64_t t, RowConstants* constants) {
  RowConstants& row = constants[t];
  const double g_logprob = grad_logprobs ? grad_logprobs[t] : 0.0;
  const double g_entropy = grad_entropy ? grad_entropy[t] : 0.0;
  row.skip = g_logprob == 0.0 && g_entropy == 0.0;
  const int64_t column = targets[t] - shard.first_column;
  row.column = column >= 0 && column < shard.columns ? column : -1;
  if (row.skip) return;
  const double max = saved[t * kSaved], log_sum = saved[t * kSaved + 1], mean = saved[t * kSaved + 2];
  const double rate = shard.rate;
  const double raw_max = max * shard.temperature;
  row.shift = shift_of(static_cast<float>(raw_max), shard.rate);
  const double moved = rate * raw_max - row.shift;
  // p_j = e_j scale, log p_j + H = ln 2 (y_j - moved) - W/S.
  const double scale = exp(-log_sum - kLn2 * moved);
  row.slope = static_cast<float>(-g_entropy / shard.temperature * kLn2 * scale);
  const double intercept = -g_logprob / shard.temperature * scale - row.slope * (moved + mean / kLn2);
  row.high = static_cast<float>(intercept);
  row.low = static_cast<float>(intercept - row.high);
  const double x = row.column >= 0 ? static_cast<double>(Words<T>::one(logits + t * shard.stride + row.column)) : 0.0;
  row.target_gradient = static_cast<float>(
      row_gradient<float>(max, log_sum, mean, x / shard.temperature, g_logprob, g_entropy, shard.temperature)
          .target_gradient);
}

MRLVR_DEVICE float gradient_of(float x, const RowConstants& row, float rate) {
  const float y = device::max_nan(device::fused(x, rate, -row.shift), kLowest);
  const float e = device::exp2_approx(y);
  return device::fused(e, device::fused(row.slope, y, row.high), e * row.low);
}

// One block: gradient of a split of a row into `gradient` (rows `gradient_stride` apart), which may be the logits.
template <typename T, int kThreads>
MRLVR_DEVICE void gradient_body(const T* logits, T* gradient, int64_t gradient_stride, const RowConstants* constants,
                                const Shard& shard) {
  constexpr int kElements = Part<T>::kElements;
  const int64_t t = device::block_index() / shard.splits;
  const int split = static_cast<int>(device::block_index() % shard.splits);
  const int thread = device::thread_index();
  const T* row = logits + t * shard.stride;
  T* out = gradient + t * gradient_stride;
  const RowConstants constant = constants[t];
  // A new gradient may lie otherwise in memory than the logits: then element by element.
  const bool aligned =
      reinterpret_cast<uintptr_t>(row) % sizeof(Vector) == reinterpret_cast<uintptr_t>(out) % sizeof(Vector);
  const Part<T> part(row, shard.columns, split, shard.splits);
  const int start = Part<T>::start(row, shard.columns);
  auto one = [&](int i) {
    Words<T>::set(out + i, constant.skip ? 0.0f : gradient_of(Words<T>::one(row + i), constant, shard.rate));
  };
  if (aligned) {
    const T* from = row + start;
    T* to = out + start;
    int v = part.first_vector + thread;
    for (; v + (kUnroll - 1) * kThreads < part.end_vector; v += kUnroll * kThreads) {
      Vector loaded[kUnroll] = {};
      if (!constant.skip) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) loaded[u] = device::load_vector(from + (v + u * kThreads) * kElements);
#pragma unroll
        for (int i = 0; i < 4 * kUnroll; ++i) {
          float x[Words<T>::kElements];
          Words<T>::unpack(loaded[i / 4].word[i % 4], x);
#pragma unroll
          for (int k = 0; k < Words<T>::kElements; ++k) x[k] = gradient_of(x[k], constant, shard.rate);
          loaded[i / 4].word[i % 4] = Words<T>::pack(x);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) device::store_vector(to + (v + u * kThreads) * kElements, loaded[u]);
    }
    for (; v < part.end_vector; v += kThreads) {
      Vector loaded = {};
      if (!constant.skip) {
        loaded = device::load_vector(from + v * kElements);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x[Words<T>::kElements];
          Words<T>::unpack(loaded.word[i], x);
#pragma unroll
          for (int k = 0; k < Words<T>::kElements; ++k) x[k] = gradient_of(x[k], constant, shard.rate);
          loaded.word[i] = Words<T>::pack(x);
        }
      }
      device::store_vector(to + v * kElements, loaded);
    }
  } else {
    const int end = start + part.end_vector * kElements;
    for (int i = start + part.first_vector * kElements + thread; i < end; i += kThreads) one(i);
  }
  for (int i = thread; i < part.head; i += kThreads) one(i);
  for (int i = part.tail + thread; i < shard.columns; i += kThreads) one(i);
  if (split == shard.splits - 1) {
    for (int i = shard.columns + thread; i < shard.width; i += kThreads) Words<T>::set(out + i, 0.0f);
  }
  // The split whose elements include the target writes it anew, after the barrier.
  device::sync_threads();
  if (thread != 0 || constant.skip || constant.column < 0) return;
  const int64_t column = constant.column;
  const bool mine = column < part.head || (column >= part.tail && column < shard.columns) ||
                    (column >= start + part.first_vector * kElements && column < start + part.end_vector * kElements);
  if (mine) Words<T>::set(out + column, constant.target_gradient);
}

}  // namespace megatron_rlvr::vocab_logprob::cuda
