// For machines with neither AVX2 nor AVX-512: the same loops over small arrays, which any compiler turns into what
// its target has.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "ops/cpu/exp2_polynomial.h"
#include "ops/cpu/vocab_logprob_kernel.h"

namespace megatron_rlvr::vocab_logprob::cpu {
namespace {

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  // A subnormal half is an integer times 2^-24.
  return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
}

uint16_t float_to_half(float x) {
  const uint32_t bits = to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds past the largest half
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
    return sign | static_cast<uint16_t>(to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));
  }
  return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

struct Simd {
  static constexpr int64_t kWidth = 8;

  struct Float {
    float lane[kWidth];
  };

  struct Exponential {
    Float value;
    bool valid[kWidth];
  };

  template <typename F>
  static Float map(F f) {
    Float out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = f(i);
    return out;
  }

  static Float set(float x) {
    return map([=](int) { return x; });
  }
  static Float add(Float a, Float b) {
    return map([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Float sub(Float a, Float b) {
    return map([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Float mul(Float a, Float b) {
    return map([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float fma(Float a, Float b, Float c) {
    return map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  // In fp64, since `fma` here rounds twice.
  static Float times_line(Float e, Float d, Float slope, Float high, Float low) {
    return map([&](int i) {
      const double line = static_cast<double>(slope.lane[i]) * d.lane[i] + high.lane[i] + low.lane[i];
      return static_cast<float>(e.lane[i] * line);
    });
  }
  static Float max(Float a, Float b) {
    return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }

  static float reduce_max(Float a) {
    float top = a.lane[0];
    for (int i = 1; i < kWidth; ++i) top = a.lane[i] > top ? a.lane[i] : top;
    return top;
  }

  struct Doubles {
    double lane[kWidth];
  };
  static Doubles zeros() { return {}; }
  static void gather(Doubles& sum, Float a, Float b) {
    for (int i = 0; i < kWidth; ++i) sum.lane[i] += static_cast<double>(a.lane[i]) + b.lane[i];
  }
  static double total(Doubles sum) {
    double all = 0.0;
    for (int i = 0; i < kWidth; ++i) all += sum.lane[i];
    return all;
  }

  static void prefetch(uintptr_t) {}

  static Exponential exp2(Float y) {
    Exponential e;
    for (int i = 0; i < kWidth; ++i) {
      e.valid[i] = !(y.lane[i] < kExp2Lowest);
      const float x = e.valid[i] ? y.lane[i] : 0.0f;
      // Adding 1.5 * 2^23 rounds to the nearest integer, which then lies in the low bits; NaN stays NaN.
      const float shifted = x + 0x1.8p23f;
      const float f = x - (shifted - 0x1.8p23f);
      float p = kExp2C5 + f * kExp2C6;
      p = kExp2C4 + f * p;
      p = kExp2C3 + f * p;
      p = kExp2C2 + f * p;
      p = kExp2C1 + f * p;
      p = 1.0f + f * p;
      const float power = from_bits((to_bits(shifted) + 127u) << 23);
      e.value.lane[i] = e.valid[i] ? p * power : 0.0f;
    }
    return e;
  }

  static Exponential square(Exponential e) {
    e.value = mul(e.value, e.value);
    return e;
  }
  static Float fma_valid(Exponential e, Float d, Float sum) {
    return map([&](int i) { return e.valid[i] ? e.value.lane[i] * d.lane[i] + sum.lane[i] : sum.lane[i]; });
  }
  static Float keep(Exponential e, Float x) {
    return map([&](int i) { return e.valid[i] ? x.lane[i] : 0.0f; });
  }
  static void drop_zeros(Float d, Exponential& e) {
    for (int i = 0; i < kWidth; ++i) e.value.lane[i] = d.lane[i] != 0.0f ? e.value.lane[i] : 0.0f;
  }

  static float negative_infinity(float) { return -std::numeric_limits<float>::infinity(); }
  static BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
  static Float16 negative_infinity(Float16) { return {0xfc00}; }

  static float widen(float x) { return x; }
  static float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
  static float widen(Float16 x) { return half_to_float(x.bits); }
  static void narrow(float x, float& to) { to = x; }
  static void narrow(float x, BFloat16& to) {
    const uint32_t bits = to_bits(x);
    to.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  static void narrow(float x, Float16& to) { to.bits = float_to_half(x); }

  template <typename T>
  static void load(const T* x, Float& a, Float& b) {
    for (int i = 0; i < kWidth; ++i) {
      a.lane[i] = widen(x[i]);
      b.lane[i] = widen(x[kWidth + i]);
    }
  }
  template <typename T>
  static void store(T* x, Float a, Float b) {
    for (int i = 0; i < kWidth; ++i) {
      narrow(a.lane[i], x[i]);
      narrow(b.lane[i], x[kWidth + i]);
    }
  }
};

#include "ops/cpu/vocab_logprob_rows.h"

}  // namespace

const RowKernels& portable_kernels() {
  return kernels_of_this_set("portable");
}

}  // namespace megatron_rlvr::vocab_logprob::cpu
