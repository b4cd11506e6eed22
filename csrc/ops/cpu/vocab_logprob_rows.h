// The row loops of vocab_logprob, once for every instruction set. Included by vocab_logprob_<set>.cpp inside that
// file's target region and anonymous namespace, after a `Simd` type:
//   kWidth, Float, set, add, sub, mul, fma, max, reduce_max, prefetch, Doubles, zeros, gather (two
//   registers into fp64 sums), total,
//   times_line (e (high + slope d + low), rounded once at the end so that `low` counts),
//   load and store of 2 * kWidth elements as two registers (in any fixed order),
//   exp2 (2^y for y <= 0; exactly 0, and marked invalid, below -126; NaN for NaN), and of its results: square,
//   fma_valid (no addend where invalid: 0 * -inf), keep (0 where invalid), drop_zeros (0 where d = 0).
// No include guard: each set instantiates its own copy, and no code of one may be shared with another.

// Elements handled between two looks at the maximum: 4 KiB of bf16, which stays in the first cache level between
// the search for the maximum and the sums.
constexpr int64_t kBlock = 2048;
constexpr int64_t kPair = 2 * Simd::kWidth;
// Registers summed in fp32 before they join the fp64 sums. So short a chain keeps the rounding of a row's W/S near
// 1e-9 of it, which is what the sum of an entropy gradient's row over nearly equal logits is made of.
constexpr int64_t kChain = 4;
constexpr double kLog2E = 1.4426950408889634074;

template <typename T>
struct RowLoops {
  using Float = typename Simd::Float;

  // Columns that fill whole register pairs; the rest goes through a padded copy.
  static int64_t whole(int64_t columns) { return columns - columns % kPair; }

  static void pad(const T* from, int64_t count, T* to) {
    for (int64_t i = 0; i < kPair; ++i) to[i] = i < count ? from[i] : Simd::negative_infinity(T{});
  }

  static float maximum(const T* x, int64_t count) {
    Float top0 = Simd::set(-std::numeric_limits<float>::infinity());
    Float top1 = top0;
    for (int64_t i = 0; i < count; i += kPair) {
      Float a, b;
      Simd::load(x + i, a, b);
      top0 = Simd::max(top0, a);
      top1 = Simd::max(top1, b);
    }
    return Simd::reduce_max(Simd::max(top0, top1));
  }

  // Adds the sums of x[0, count) about `shift` to `s`. kSkip leaves out the elements equal to the shift.
  template <bool kMoments, bool kSkip>
  static void add_sums(const T* x, int64_t count, float shift, float rate, Statistics& s) {
    const Float top = Simd::set(shift);
    const Float scale = Simd::set(rate);
    typename Simd::Doubles all_sum = Simd::zeros(), all_weighted = all_sum, all_sum2 = all_sum, all_weighted2 = all_sum;
    for (int64_t start = 0; start < count; start += kChain * kPair) {
      const int64_t stop = start + kChain * kPair < count ? start + kChain * kPair : count;
      Float sum0 = Simd::set(0.f), sum1 = sum0, weighted0 = sum0, weighted1 = sum0;
      Float sum2 = sum0, weighted2 = sum0;
      for (int64_t i = start; i < stop; i += kPair) {
        Float a, b;
        Simd::load(x + i, a, b);
        Simd::prefetch(reinterpret_cast<uintptr_t>(x + i) + kBlock * sizeof(T));
        a = Simd::sub(a, top);
        b = Simd::sub(b, top);
        auto ea = Simd::exp2(Simd::mul(a, scale));
        auto eb = Simd::exp2(Simd::mul(b, scale));
        if (kSkip) {
          Simd::drop_zeros(a, ea);
          Simd::drop_zeros(b, eb);
        }
        sum0 = Simd::add(sum0, ea.value);
        sum1 = Simd::add(sum1, eb.value);
        weighted0 = Simd::fma_valid(ea, a, weighted0);
        weighted1 = Simd::fma_valid(eb, b, weighted1);
        if (kMoments) {
          sum2 = Simd::fma(ea.value, ea.value, Simd::fma(eb.value, eb.value, sum2));
          const auto qa = Simd::square(ea), qb = Simd::square(eb);
          weighted2 = Simd::fma_valid(qa, a, Simd::fma_valid(qb, b, weighted2));
        }
      }
      Simd::gather(all_sum, sum0, sum1);
      Simd::gather(all_weighted, weighted0, weighted1);
      if (kMoments) {
        Simd::gather(all_sum2, sum2, Simd::set(0.f));
        Simd::gather(all_weighted2, weighted2, Simd::set(0.f));
      }
    }
    s.sum += Simd::total(all_sum);
    s.weighted += Simd::total(all_weighted);
    if (kMoments) {
      s.sum2 += Simd::total(all_sum2);
      s.weighted2 += Simd::total(all_weighted2);
    }
  }

  template <bool kMoments>
  static Statistics statistics(const void* logits, int64_t columns, double temperature) {
    const T* x = static_cast<const T*>(logits);
    const double inverse_temperature = 1.0 / temperature;
    const float rate = static_cast<float>(kLog2E / temperature);
    Statistics s;
    const T* peak = x;       // the block that holds the maximum,
    int64_t peak_count = 0;  // its length,
    double peak_sum = 0.0;   // and what it gave to the sum
    T tail[kPair];
    auto block = [&](const T* from, int64_t count) {
      const float top = maximum(from, count);
      const bool higher = top > s.max;
      if (higher) raise_shift(s, top, inverse_temperature);
      const double before = s.sum;
      // A row that is -inf so far is summed about 0: nothing is added, but a NaN shows.
      const bool empty = !(s.max > -INFINITY);
      add_sums<kMoments, false>(from, count, empty ? 0.f : static_cast<float>(s.max), rate, s);
      if (higher) {
        peak = from;
        peak_count = count;
        peak_sum = s.sum - before;
      }
    };
    const int64_t full = whole(columns);
    for (int64_t start = 0; start < full; start += kBlock) {
      block(x + start, full - start < kBlock ? full - start : kBlock);
    }
    if (full < columns) {
      pad(x + full, columns - full, tail);
      block(tail, kPair);
    }
    if (s.sum < 1.5 && peak_count > 0) refine_peak(peak, peak_count, peak_sum, rate, s);
    return s;
  }

  // One logit holds most of the probability: its 1 swallowed the fp32 digits of what its block has beside it. That
  // block is summed again without it, so that log S = log(1 + rest) keeps the rest's relative accuracy.
  static void refine_peak(const T* x, int64_t count, double counted, float rate, Statistics& s) {
    Statistics rest;
    add_sums<false, true>(x, count, static_cast<float>(s.max), rate, rest);
    s.sum = (s.sum - counted) + rest.sum + 1.0;
  }

  static void gradient(const void* logits, void* out, int64_t columns, double temperature, const RowGradient& row) {
    const T* x = static_cast<const T*>(logits);
    T* g = static_cast<T*>(out);
    const float rate = static_cast<float>(kLog2E / temperature);
    const float intercept = static_cast<float>(row.intercept);
    const Float shift = Simd::set(static_cast<float>(row.shift)), scale = Simd::set(rate);
    const Float slope = Simd::set(static_cast<float>(row.slope)), high = Simd::set(intercept);
    const Float low = Simd::set(static_cast<float>(row.intercept - intercept));
    auto pair = [&](const T* from, T* to) {
      Float a, b;
      Simd::load(from, a, b);
      a = Simd::sub(a, shift);
      b = Simd::sub(b, shift);
      const auto ea = Simd::exp2(Simd::mul(a, scale));
      const auto eb = Simd::exp2(Simd::mul(b, scale));
      a = Simd::keep(ea, Simd::times_line(ea.value, a, slope, high, low));
      b = Simd::keep(eb, Simd::times_line(eb.value, b, slope, high, low));
      Simd::store(to, a, b);
    };
    const int64_t full = whole(columns);
    for (int64_t i = 0; i < full; i += kPair) pair(x + i, g + i);
    if (full < columns) {
      T tail[kPair];
      pad(x + full, columns - full, tail);
      pair(tail, tail);
      for (int64_t i = full; i < columns; ++i) g[i] = tail[i - full];
    }
  }
};

// fp64 logits serve checks by finite differences: plain loops in fp64 throughout.
struct DoubleLoops {
  template <bool kMoments>
  static Statistics statistics(const void* logits, int64_t columns, double temperature) {
    const double* x = static_cast<const double*>(logits);
    Statistics s;
    for (int64_t i = 0; i < columns; ++i) s.max = x[i] > s.max ? x[i] : s.max;
    const double shift = s.max > -INFINITY ? s.max : 0.0;
    for (int64_t i = 0; i < columns; ++i) {
      const double d = x[i] - shift;
      const double e = exp(d / temperature);
      s.sum += e;
      if (e == 0.0) continue;
      s.weighted += d * e;
      s.sum2 += e * e;
      s.weighted2 += d * e * e;
    }
    return s;
  }

  static void gradient(const void* logits, void* out, int64_t columns, double temperature, const RowGradient& row) {
    const double* x = static_cast<const double*>(logits);
    double* g = static_cast<double*>(out);
    for (int64_t i = 0; i < columns; ++i) {
      const double d = x[i] - row.shift;
      const double e = exp(d / temperature);
      g[i] = e == 0.0 ? 0.0 : e * (row.intercept + row.slope * d);
    }
  }
};

const RowKernels& kernels_of_this_set(const char* name) {
  static const RowKernels set = {
      name,
      {RowLoops<BFloat16>::statistics<false>, RowLoops<Float16>::statistics<false>, RowLoops<float>::statistics<false>,
       DoubleLoops::statistics<false>},
      {RowLoops<BFloat16>::statistics<true>, RowLoops<Float16>::statistics<true>, RowLoops<float>::statistics<true>,
       DoubleLoops::statistics<true>},
      {RowLoops<BFloat16>::gradient, RowLoops<Float16>::gradient, RowLoops<float>::gradient, DoubleLoops::gradient},
  };
  return set;
}
