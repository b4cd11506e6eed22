// The CUDA kernels of group_advantages run on the CPU, behind a C interface for tests (tests/unit/csrc).

#include <cmath>
#include <cstring>
#include <vector>

#include "ops/cuda/group_advantages_body.h"

namespace {

using namespace megatron_rlvr;
using namespace megatron_rlvr::group_advantages;

constexpr int kThreads = 64;

}  // namespace

extern "C" {

// Optional columns may be null; returns the outcome.
int32_t emulated_group_advantages(const double* reward, const bool* valid, const double* correctness,
                                  const double* penalty, const int64_t* length, int64_t num_responses,
                                  const int64_t* group_size, const int64_t* rank, const int64_t* below,
                                  const double* fraction, int64_t num_groups, int64_t estimator, int64_t std,
                                  int64_t mask, double eps, double positive_weight, double* advantages) {
  const Settings settings{static_cast<Estimator>(estimator), static_cast<Std>(std), static_cast<Mask>(mask), eps,
                          positive_weight};
  const Inputs in{reward,     valid, correctness, penalty,  length,     num_responses,
                  group_size, rank,  below,       fraction, num_groups, /*penalty_additive=*/true};
  std::vector<int64_t> start(num_groups);
  for (int64_t g = 1; g < num_groups; ++g) start[g] = start[g - 1] + group_size[g - 1];
  std::vector<double> scratch(kScratchColumns * num_responses, NAN), shared(kThreads);
  const auto garbage = [&] { std::memset(static_cast<void*>(shared.data()), 0xa5, shared.size() * sizeof(double)); };
  int32_t outcome = 0;
  const int64_t blocks = (num_groups + kThreads - 1) / kThreads;
  device::launch(
      blocks, kThreads,
      [&] {
        const int64_t g = device::block_index() * kThreads + device::thread_index();
        if (g < num_groups) cuda::group_body(settings, in, start.data(), g, scratch.data(), advantages, &outcome);
      },
      garbage);
  if (settings.estimator == Estimator::kReinforcePp || settings.estimator == Estimator::kReinforcePpBaseline) {
    device::launch(1, kThreads, [&] { cuda::whiten_body<kThreads>(in, advantages, shared.data()); }, garbage);
  } else if (settings.estimator == Estimator::kGpg) {
    device::launch(1, kThreads, [&] { cuda::scale_by_nonzero_body<kThreads>(in, advantages, shared.data()); }, garbage);
  }
  return outcome;
}

}  // extern "C"
