#include "ops/cpu/policy_loss_kernel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <unordered_map>
#include <vector>

namespace megatron_rlvr::policy_loss::cpu {

namespace {

// Sums are taken per block of this many tokens and then in block order: the same for any number of threads.
constexpr int64_t kBlock = 8192;

}  // namespace

template <typename T>
void evaluate_tokens(const Settings<T>& settings, const Inputs<T>& in, T* loss, T* slope, double* sums) {
  const int64_t num_blocks = (in.num_tokens + kBlock - 1) / kBlock;
  std::vector<std::array<double, kSums>> partial(num_blocks);
  at::parallel_for(0, num_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      std::array<double, kSums> block_sums{};
      const int64_t end = std::min(in.num_tokens, (block + 1) * kBlock);
      for (int64_t t = block * kBlock; t < end; ++t) {
        if (!in.mask[t]) {
          if (loss) loss[t] = 0;
          slope[t] = 0;
          continue;
        }
        const bool selected = in.selected && in.selected[t];
        const T sequence = in.sequence_logratio ? in.sequence_logratio[t] : T(0);
        const Outcome<T> out =
            evaluate(settings, in.logprob[t], in.old_logprob[t], in.advantage[t], selected, sequence);
        const double scale = scale_of(in, t);
        if (loss) loss[t] = out.loss;
        slope[t] = static_cast<T>(scale * static_cast<double>(out.slope));
        add_to_sums(block_sums.data(), out, selected, scale);
      }
      partial[block] = block_sums;
    }
  });
  std::fill(sums, sums + kSums, 0.0);
  for (const auto& block_sums : partial) {
    for (int64_t i = 0; i < kSums; ++i) {
      sums[i] = i == kRatioMax ? std::max(sums[i], block_sums[i]) : sums[i] + block_sums[i];
    }
  }
}

template <typename T>
void mark_ratio_clipped(const Settings<T>& settings, const Inputs<T>& in, bool* clipped) {
  at::parallel_for(0, in.num_tokens, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      clipped[t] = false;
      if (!in.mask[t]) continue;
      const Outcome<T> out = evaluate(settings, in.logprob[t], in.old_logprob[t], in.advantage[t], false, T(0));
      clipped[t] = out.clipped_high || out.clipped_low;
    }
  });
}

template <typename T>
void sequence_logratios(const T* logprob, const T* old_logprob, const bool* mask, const int64_t* trajectory,
                        int64_t num_tokens, T* out) {
  struct Running {
    double sum = 0.0;
    int64_t count = 0;
  };
  std::unordered_map<int64_t, Running> sequences;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (!mask[t]) continue;
    Running& running = sequences[trajectory[t]];
    running.sum += static_cast<double>(logprob[t] - old_logprob[t]);
    ++running.count;
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (!mask[t]) {
      out[t] = 0;
      continue;
    }
    const Running& running = sequences[trajectory[t]];
    out[t] = static_cast<T>(running.sum / static_cast<double>(running.count));
  }
}

template void evaluate_tokens<float>(const Settings<float>&, const Inputs<float>&, float*, float*, double*);
template void evaluate_tokens<double>(const Settings<double>&, const Inputs<double>&, double*, double*, double*);
template void mark_ratio_clipped<float>(const Settings<float>&, const Inputs<float>&, bool*);
template void mark_ratio_clipped<double>(const Settings<double>&, const Inputs<double>&, bool*);
template void sequence_logratios<float>(const float*, const float*, const bool*, const int64_t*, int64_t, float*);
template void sequence_logratios<double>(const double*, const double*, const bool*, const int64_t*, int64_t, double*);

}  // namespace megatron_rlvr::policy_loss::cpu
