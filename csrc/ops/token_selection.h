// Exact token selection of Clip-Cov and KL-Cov: the scalar mathematics that the CPU and CUDA twins share.
//
// The selected set must be bitwise the same for any number of ranks and any packing, so that everything that decides
// is an integer or a correctly rounded number: sums are exact fixed-point numbers, Cov is rounded to float32 once,
// and the order is that of the pair (key, token id), both unsigned 64-bit (sections B1, B3-B5 of the specification).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MRLVR_HOST_DEVICE __host__ __device__
#else
#define MRLVR_HOST_DEVICE
#endif

namespace megatron_rlvr::token_selection {

// In the order of megatron_rlvr/ops/native_tokens.py.
enum class Method : int64_t { kClipCov = 0, kKlCov = 1 };

// A fixed-point number: sum of limb[i] 2^(32 i) in units of 2^-1074, limbs signed and free to exceed 32 bits, so that
// limbs of several threads or ranks simply add up (megatron_rlvr/ops/exact.py).
constexpr int64_t kLimbs = 68;
// Packed sums, int64 [kPacked]: N, tokens that are not finite, then the limbs of sum log pi, sum A, sum log pi A.
constexpr int64_t kPacked = 2 + 3 * kLimbs;

// A finite double as at most three 32-bit pieces of its magnitude, the first at `limb`.
struct Pieces {
  int64_t limb;
  int64_t piece[3];
};

MRLVR_HOST_DEVICE inline Pieces split(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const auto exponent = static_cast<int64_t>(bits >> 52 & 0x7FF);
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  // Units of 2^-1074: subnormals are their fraction; a normal number's hidden bit stands exponent - 1 places up.
  const uint64_t magnitude = exponent ? fraction | uint64_t{1} << 52 : fraction;
  const int64_t shift = exponent ? exponent - 1 : 0;
  const int64_t bit = shift % 32;
  const uint64_t low = (magnitude & 0xFFFFFFFFu) << bit;
  const uint64_t high = ((magnitude >> 32) << bit) + (low >> 32);
  const int64_t sign = bits >> 63 ? -1 : 1;
  return {shift / 32,
          {sign * static_cast<int64_t>(low & 0xFFFFFFFFu), sign * static_cast<int64_t>(high & 0xFFFFFFFFu),
           sign * static_cast<int64_t>(high >> 32)}};
}

MRLVR_HOST_DEVICE inline bool is_finite(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return (bits >> 52 & 0x7FF) != 0x7FF;
}

// splitmix64's output function.
MRLVR_HOST_DEVICE inline uint64_t mix64(uint64_t value) {
  value += 0x9E3779B97F4A7C15u;
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
  value = (value ^ value >> 27) * 0x94D049BB133111EBu;
  return value ^ value >> 31;
}

// Ascending keys of descending float32 values, -0.0 counted as 0.0; 32 bits.
MRLVR_HOST_DEVICE inline uint64_t descending_key(float value) {
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint32_t>(~ascending);
}

MRLVR_HOST_DEVICE inline uint64_t token_id(int64_t trajectory, int64_t position) {
  return static_cast<uint64_t>(trajectory) << 32 | static_cast<uint64_t>(position);
}

// How a token becomes a candidate and what its key is.
struct Rule {
  Method method;
  double mean_logprob;
  double mean_advantage;
  double lower;  // exclusive bounds of Clip-Cov
  double upper;
  uint64_t stream;  // mix64(mix64(seed) ^ step)
};

// The token's Cov, rounded once.
MRLVR_HOST_DEVICE inline float covariance(const Rule& rule, double logprob, double advantage) {
  return static_cast<float>((logprob - rule.mean_logprob) * (advantage - rule.mean_advantage));
}

// Whether a masked token is a candidate; if so its key.
MRLVR_HOST_DEVICE inline bool candidate_key(const Rule& rule, double logprob, double advantage, bool excluded,
                                            uint64_t id, uint64_t* key) {
  const float cov = covariance(rule, logprob, advantage);
  if (rule.method == Method::kKlCov) {
    *key = descending_key(cov);
    return !excluded;
  }
  *key = mix64(id ^ rule.stream);
  return !excluded && static_cast<double>(cov) > rule.lower && static_cast<double>(cov) < rule.upper;
}

constexpr int64_t kMaxDigitBits = 12;  // a histogram fits into shared memory

// One radix pass counts the digits [shift, shift + bits) of keys whose higher bits equal `prefix`.
MRLVR_HOST_DEVICE inline bool has_prefix(uint64_t value, uint64_t prefix, int64_t shift, int64_t bits) {
  return shift + bits >= 64 ? prefix == 0 : value >> (shift + bits) == prefix;
}

MRLVR_HOST_DEVICE inline int64_t digit(uint64_t value, int64_t shift, int64_t bits) {
  return static_cast<int64_t>(value >> shift & ((uint64_t{1} << bits) - 1));
}

}  // namespace megatron_rlvr::token_selection
