// The CUDA kernels of policy_loss and token_selection run on the CPU, behind a C interface for tests (tests/unit/csrc).

#include <cmath>
#include <cstring>
#include <vector>

#include "ops/cuda/policy_loss_body.h"
#include "ops/cuda/token_selection_body.h"

namespace {

using namespace megatron_rlvr;
namespace loss_ops = megatron_rlvr::policy_loss;
namespace selection = megatron_rlvr::token_selection;

constexpr int kThreads = 64;

template <typename T>
void fill_with_garbage(std::vector<T>& shared) {
  std::memset(static_cast<void*>(shared.data()), 0xa5, shared.size() * sizeof(T));
}

}  // namespace

extern "C" {

// `sums` has kSums entries; options as in the schema of policy_loss, dual_clip NaN for none. `weight`, `importance` and
// `loss` may be null.
void emulated_policy_loss(const float* logprob, const float* old_logprob, const float* advantage, const bool* mask,
                          const bool* selected, const float* sequence_logratio, const float* weight,
                          const float* importance, int64_t num_tokens, int64_t loss_kind, double eps_low,
                          double eps_high, double dual_clip, double clamp, double beta, int64_t kl, int64_t blocks,
                          float* loss, float* slope, double* sums) {
  const loss_ops::Settings<float> settings{
      static_cast<loss_ops::Loss>(loss_kind), static_cast<loss_ops::Kl>(kl), static_cast<float>(1.0 - eps_low),
      static_cast<float>(1.0 + eps_high),     static_cast<float>(clamp),     static_cast<float>(beta),
      static_cast<float>(dual_clip),          !std::isnan(dual_clip)};
  const loss_ops::Inputs<float> in{logprob,           old_logprob, advantage,  mask,      selected,
                                   sequence_logratio, weight,      importance, num_tokens};
  std::vector<double> partial(blocks * loss_ops::kSums, NAN), shared(kThreads);
  device::launch(
      blocks, kThreads,
      [&] {
        loss_ops::cuda::evaluate_body<float, kThreads>(settings, in, blocks, loss, slope, partial.data(),
                                                       shared.data());
      },
      [&] { fill_with_garbage(shared); });
  for (int64_t sum = 0; sum < loss_ops::kSums; ++sum) {
    loss_ops::cuda::finish_body(partial.data(), blocks, sum, sums);
  }
}

// Adds to `packed` [kPacked].
void emulated_covariance_sums(const double* logprob, const double* advantage, const bool* mask, int64_t num_tokens,
                              int64_t blocks, int64_t* packed) {
  std::vector<uint64_t> shared(kThreads / device::kWarp * selection::kPacked);
  device::launch(
      blocks, kThreads,
      [&] {
        selection::cuda::sums_body<double, kThreads>(logprob, advantage, mask, num_tokens, blocks,
                                                     reinterpret_cast<uint64_t*>(packed), shared.data());
      },
      [&] { fill_with_garbage(shared); });
}

// Adds to `counts` [2^bits].
void emulated_digits(const int64_t* values, int64_t size, int64_t blocks, uint64_t prefix, int64_t shift, int64_t bits,
                     const int64_t* among, int64_t among_value, int64_t* counts) {
  std::vector<uint32_t> shared(int64_t{1} << bits);
  device::launch(
      blocks, kThreads,
      [&] {
        selection::cuda::digits_body<kThreads>(values, size, blocks, prefix, shift, bits, among, among_value,
                                               reinterpret_cast<uint64_t*>(counts), shared.data());
      },
      [&] { fill_with_garbage(shared); });
}

}  // extern "C"
