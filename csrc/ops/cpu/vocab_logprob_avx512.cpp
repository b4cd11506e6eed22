#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "ops/cpu/exp2_polynomial.h"
#include "ops/cpu/vocab_logprob_kernel.h"

// Only what stands between here and the end of the region is compiled for AVX-512: no header may stand there but the
// loops, so that no shared inline function is emitted with instructions that other machines lack.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
// GCC 12's own intrinsics start from an uninitialised register (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif

namespace megatron_rlvr::vocab_logprob::cpu {
namespace {

struct Simd {
  using Float = __m512;
  static constexpr int64_t kWidth = 16;

  struct Exponential {
    Float value;
    __mmask16 valid;
  };

  static Float set(float x) { return _mm512_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float times_line(Float e, Float d, Float slope, Float high, Float low) {
    return fma(e, fma(slope, d, high), mul(e, low));
  }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static float reduce_max(Float a) { return _mm512_reduce_max_ps(a); }

  using Doubles = __m512d;
  static Doubles zeros() { return _mm512_setzero_pd(); }
  static void gather(Doubles& sum, Float a, Float b) {
    const __m512d from_a =
        _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
    const __m512d from_b =
        _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(b)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)));
    sum = _mm512_add_pd(sum, _mm512_add_pd(from_a, from_b));
  }
  static double total(Doubles sum) { return _mm512_reduce_add_pd(sum); }

  // By number: the address may lie beyond the logits, where a pointer may not.
  static void prefetch(uintptr_t address) { _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0); }

  static Exponential exp2(Float y) {
    const __mmask16 valid = _mm512_cmp_ps_mask(y, set(kExp2Lowest), _CMP_NLT_UQ);
    const Float n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Float f = sub(y, n);
    Float p = fma(f, set(kExp2C6), set(kExp2C5));
    p = fma(f, p, set(kExp2C4));
    p = fma(f, p, set(kExp2C3));
    p = fma(f, p, set(kExp2C2));
    p = fma(f, p, set(kExp2C1));
    p = fma(f, p, set(1.0f));
    return {_mm512_maskz_scalef_ps(valid, p, n), valid};
  }

  static Exponential square(Exponential e) { return {mul(e.value, e.value), e.valid}; }
  static Float fma_valid(Exponential e, Float d, Float sum) { return _mm512_mask3_fmadd_ps(e.value, d, sum, e.valid); }
  static Float keep(Exponential e, Float x) { return _mm512_maskz_mov_ps(e.valid, x); }
  static void drop_zeros(Float d, Exponential& e) {
    e.value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(d, set(0.0f), _CMP_NEQ_UQ), e.value);
  }

  static float negative_infinity(float) { return -std::numeric_limits<float>::infinity(); }
  static BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
  static Float16 negative_infinity(Float16) { return {0xfc00}; }

  static void load(const float* x, Float& a, Float& b) {
    a = _mm512_loadu_ps(x);
    b = _mm512_loadu_ps(x + kWidth);
  }
  static void store(float* x, Float a, Float b) {
    _mm512_storeu_ps(x, a);
    _mm512_storeu_ps(x + kWidth, b);
  }

  // The even elements in one register and the odd in the other: a shift and a mask instead of lane crossings.
  static void load(const BFloat16* x, Float& even, Float& odd) {
    const __m512i both = _mm512_loadu_si512(x);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store(BFloat16* x, Float even, Float odd) {
    const __m512i low = _mm512_srli_epi32(to_nearest(even), 16);
    const __m512i high = to_nearest(odd);
    _mm512_storeu_si512(x, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
  }
  // The upper half of each word is the nearest bf16, ties to even.
  static __m512i to_nearest(Float x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
  }

  static void load(const Float16* x, Float& a, Float& b) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(x);
    a = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
  }
  static void store(Float16* x, Float a, Float b) {
    __m256i* halves = reinterpret_cast<__m256i*>(x);
    _mm256_storeu_si256(halves, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(halves + 1, _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }
};

#include "ops/cpu/vocab_logprob_rows.h"

}  // namespace

const RowKernels& avx512_kernels() {
  return kernels_of_this_set("avx512");
}

}  // namespace megatron_rlvr::vocab_logprob::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
