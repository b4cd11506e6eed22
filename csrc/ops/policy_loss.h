// Per-token policy losses and their derivatives: the scalar mathematics that the CPU and CUDA twins share.
//
// lr = log pi - log pi_old clamped to +-clamp, r = e^lr; the derivative outside the clamp is 0, on its border that of
// the inside. At r equal to a clip bound the unclipped branch keeps its derivative (sections B3, B4, E1 of the
// specification).
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MRLVR_HOST_DEVICE __host__ __device__
#else
#define MRLVR_HOST_DEVICE
#endif

namespace megatron_rlvr::policy_loss {

// In the order of megatron_rlvr/ops/native_tokens.py.
enum class Loss : int64_t { kPpo = 0, kClipCov = 1, kKlCov = 2, kGspo = 3, kCispo = 4 };
enum class Kl : int64_t { kAbs = 0, kK1 = 1, kK2 = 2, kK3 = 3 };

// Columns of the sums over masked tokens, fp64 [kSums].
enum Sum : int64_t {
  kTokens = 0,
  kK3Sum,                  // e^lr - 1 - lr
  kRatioSum,               // r
  kRatioMax,               // r, a maximum
  kClippedHigh,            // the clip decides the loss and A > 0
  kClippedLow,             // and A < 0
  kDualClipped,            // the dual clip decides the loss
  kSelected,               // selected tokens
  kSelectedClipped,        // of these, ratio-clipped: wasted slots of Clip-Cov
  kSelectedOnPolicy,       // of these, with log ratio 0: KL-Cov cannot act
  kPenaltySum,             // KL-Cov's penalty
  kMetricSums,             // so many are behind the metrics; the rest is the loss
  kLossSum = kMetricSums,  // weight x importance x loss; the plain loss where the call has no weights
  kSums,
};

template <typename T>
struct Settings {
  Loss loss;
  Kl kl;
  T low;    // 1 - eps_low
  T high;   // 1 + eps_high
  T clamp;  // of the log ratio
  T beta;   // of KL-Cov
  T dual_clip;
  bool has_dual_clip;
};

// Tokens of one call, all contiguous.
template <typename T>
struct Inputs {
  const T* logprob;
  const T* old_logprob;
  const T* advantage;
  const bool* mask;
  const bool* selected;        // may be null
  const T* sequence_logratio;  // may be null
  const T* weight;             // of aggregation; may be null
  const T* importance;         // may be null
  int64_t num_tokens;
};

// One masked token's outcome.
template <typename T>
struct Outcome {
  T loss = 0;
  T slope = 0;  // d loss / d log pi
  T ratio = 0;  // of the token itself, also where the loss goes by the sequence's
  T k3 = 0;
  T penalty = 0;
  bool clipped_high = false;
  bool clipped_low = false;
  bool dual_clipped = false;
  bool on_policy = false;
};

template <typename T>
MRLVR_HOST_DEVICE inline T clamped(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

// In double, so that the twins agree also where float functions are approximated (nvcc --use_fast_math).
template <typename T>
MRLVR_HOST_DEVICE inline T exp_of(T value) {
  return static_cast<T>(std::exp(static_cast<double>(value)));
}

template <typename T>
MRLVR_HOST_DEVICE inline T expm1_of(T value) {
  return static_cast<T>(std::expm1(static_cast<double>(value)));
}

// max(-A r, -A clip(r)); `inside` says whether r follows log pi at all.
template <typename T>
MRLVR_HOST_DEVICE inline void clipped_surrogate(const Settings<T>& s, T advantage, T ratio, bool inside,
                                                Outcome<T>& out) {
  const T unclipped = -advantage * ratio;
  const T bounded = -advantage * clamped(ratio, s.low, s.high);
  if (bounded > unclipped) {
    out.loss = bounded;
    out.clipped_high = advantage > 0;
    out.clipped_low = advantage < 0;
  } else {
    out.loss = unclipped;
    out.slope = inside ? unclipped : T(0);
  }
}

template <typename T>
MRLVR_HOST_DEVICE inline void kl_penalty(const Settings<T>& s, T logratio, bool inside, Outcome<T>& out) {
  T value = 0, slope = 0;
  switch (s.kl) {
    case Kl::kAbs:
      value = logratio < 0 ? -logratio : logratio;
      slope = logratio > 0 ? T(1) : (logratio < 0 ? T(-1) : T(0));
      break;
    case Kl::kK1:
      value = -logratio;
      slope = -1;
      break;
    case Kl::kK2:
      value = logratio * logratio / 2;
      slope = logratio;
      break;
    case Kl::kK3:
      slope = expm1_of(logratio);
      value = slope - logratio;
      break;
  }
  out.penalty = s.beta * value;
  out.loss += out.penalty;
  if (inside) out.slope += s.beta * slope;
}

// `sequence_logratio` is GSPO's mean over the token's sequence and read by it alone.
template <typename T>
MRLVR_HOST_DEVICE inline Outcome<T> evaluate(const Settings<T>& s, T logprob, T old_logprob, T advantage, bool selected,
                                             T sequence_logratio) {
  Outcome<T> out;
  const T raw = logprob - old_logprob;
  const T logratio = clamped(raw, -s.clamp, s.clamp);
  const bool inside = raw >= -s.clamp && raw <= s.clamp;
  out.ratio = exp_of(logratio);
  out.k3 = expm1_of(logratio) - logratio;
  out.on_policy = raw == 0;
  switch (s.loss) {
    case Loss::kPpo:
      clipped_surrogate(s, advantage, out.ratio, inside, out);
      break;
    case Loss::kGspo: {
      const bool sequence_inside = sequence_logratio >= -s.clamp && sequence_logratio <= s.clamp;
      const T ratio = exp_of(clamped(sequence_logratio, -s.clamp, s.clamp));
      clipped_surrogate(s, advantage, ratio, sequence_inside, out);
      break;
    }
    case Loss::kClipCov:
      clipped_surrogate(s, advantage, out.ratio, inside, out);
      if (selected) out.loss = out.slope = 0;
      break;
    case Loss::kKlCov:
      out.loss = -advantage * out.ratio;
      out.slope = inside ? out.loss : T(0);
      if (selected) kl_penalty(s, logratio, inside, out);
      break;
    case Loss::kCispo: {
      const T weight = clamped(out.ratio, s.low, s.high);
      out.clipped_high = out.ratio > weight;
      out.clipped_low = out.ratio < weight;
      out.slope = -weight * advantage;
      out.loss = out.slope * logprob;
      break;
    }
  }
  if (s.has_dual_clip && advantage < 0 && out.loss > -advantage * s.dual_clip) {
    out.loss = -advantage * s.dual_clip;
    out.slope = 0;
    out.dual_clipped = true;
  }
  return out;
}

// What a token's loss and slope are multiplied by.
template <typename T>
MRLVR_HOST_DEVICE inline double scale_of(const Inputs<T>& in, int64_t t) {
  const double weight = in.weight ? static_cast<double>(in.weight[t]) : 1.0;
  return in.importance ? weight * static_cast<double>(in.importance[t]) : weight;
}

template <typename T>
MRLVR_HOST_DEVICE inline void add_to_sums(double* sums, const Outcome<T>& out, bool selected, double scale) {
  sums[kTokens] += 1.0;
  sums[kLossSum] += scale * static_cast<double>(out.loss);
  sums[kK3Sum] += static_cast<double>(out.k3);
  sums[kRatioSum] += static_cast<double>(out.ratio);
  if (static_cast<double>(out.ratio) > sums[kRatioMax]) sums[kRatioMax] = static_cast<double>(out.ratio);
  sums[kClippedHigh] += out.clipped_high;
  sums[kClippedLow] += out.clipped_low;
  sums[kDualClipped] += out.dual_clipped;
  if (selected) {
    sums[kSelected] += 1.0;
    sums[kSelectedClipped] += out.clipped_high || out.clipped_low;
    sums[kSelectedOnPolicy] += out.on_policy;
    sums[kPenaltySum] += static_cast<double>(out.penalty);
  }
}

}  // namespace megatron_rlvr::policy_loss
