#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "ops/cpu/exp2_polynomial.h"
#include "ops/cpu/vocab_logprob_kernel.h"

// As in vocab_logprob_avx512.cpp: nothing but the loops may stand in the region.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace megatron_rlvr::vocab_logprob::cpu {
namespace {

struct Simd {
  using Float = __m256;
  static constexpr int64_t kWidth = 8;

  struct Exponential {
    Float value;
    Float valid;  // all bits set, or none
  };

  static Float set(float x) { return _mm256_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float times_line(Float e, Float d, Float slope, Float high, Float low) {
    return fma(e, fma(slope, d, high), mul(e, low));
  }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }

  static float reduce_max(Float a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }

  using Doubles = __m256d;
  static Doubles zeros() { return _mm256_setzero_pd(); }
  static void gather(Doubles& sum, Float a, Float b) {
    const __m256d from_a =
        _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    const __m256d from_b =
        _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(b)), _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1)));
    sum = _mm256_add_pd(sum, _mm256_add_pd(from_a, from_b));
  }
  static double total(Doubles sum) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }

  // By number: the address may lie beyond the logits, where a pointer may not.
  static void prefetch(uintptr_t address) { _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0); }

  static Exponential exp2(Float y) {
    const Float valid = _mm256_cmp_ps(y, set(kExp2Lowest), _CMP_NLT_UQ);
    const Float n = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Float f = sub(y, n);
    Float p = fma(f, set(kExp2C6), set(kExp2C5));
    p = fma(f, p, set(kExp2C4));
    p = fma(f, p, set(kExp2C3));
    p = fma(f, p, set(kExp2C2));
    p = fma(f, p, set(kExp2C1));
    p = fma(f, p, set(1.0f));
    // 2^n by adding n to the exponent; a NaN stays one, whatever is added: its n is 0x80000000, shifted to 0.
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    return {_mm256_and_ps(p, valid), valid};
  }

  static Exponential square(Exponential e) { return {mul(e.value, e.value), e.valid}; }
  static Float fma_valid(Exponential e, Float d, Float sum) { return fma(e.value, _mm256_and_ps(d, e.valid), sum); }
  static Float keep(Exponential e, Float x) { return _mm256_and_ps(e.valid, x); }
  static void drop_zeros(Float d, Exponential& e) {
    e.value = _mm256_and_ps(e.value, _mm256_cmp_ps(d, set(0.0f), _CMP_NEQ_UQ));
  }

  static float negative_infinity(float) { return -std::numeric_limits<float>::infinity(); }
  static BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
  static Float16 negative_infinity(Float16) { return {0xfc00}; }

  static void load(const float* x, Float& a, Float& b) {
    a = _mm256_loadu_ps(x);
    b = _mm256_loadu_ps(x + kWidth);
  }
  static void store(float* x, Float a, Float b) {
    _mm256_storeu_ps(x, a);
    _mm256_storeu_ps(x + kWidth, b);
  }

  // The even elements in one register and the odd in the other: a shift and a mask instead of lane crossings.
  static void load(const BFloat16* x, Float& even, Float& odd) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store(BFloat16* x, Float even, Float odd) {
    const __m256i low = _mm256_srli_epi32(to_nearest(even), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm256_blend_epi16(low, to_nearest(odd), 0xaa));
  }
  // The upper half of each word is the nearest bf16, ties to even.
  static __m256i to_nearest(Float x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
  }

  static void load(const Float16* x, Float& a, Float& b) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(x);
    a = _mm256_cvtph_ps(_mm_loadu_si128(halves));
    b = _mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
  }
  static void store(Float16* x, Float a, Float b) {
    __m128i* halves = reinterpret_cast<__m128i*>(x);
    _mm_storeu_si128(halves, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }
};

#include "ops/cpu/vocab_logprob_rows.h"

}  // namespace

const RowKernels& avx2_kernels() {
  return kernels_of_this_set("avx2");
}

}  // namespace megatron_rlvr::vocab_logprob::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
