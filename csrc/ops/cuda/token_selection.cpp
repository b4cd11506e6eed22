// CUDA entry points of token_selection.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "ops/cuda/token_selection_kernel.h"
#include "ops/token_selection_checks.h"

namespace megatron_rlvr::token_selection {

namespace {

at::Tensor sums_cuda(const at::Tensor& logprobs, const at::Tensor& advantages, const at::Tensor& mask) {
  check_tokens(logprobs, advantages, mask);
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const at::Tensor packed = at::zeros({kPacked}, logprobs.options().dtype(at::kLong));
  const int64_t size = logprobs.size(0);
  if (size == 0) return packed;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cuda::exact_sums<T>(logprobs.const_data_ptr<T>(), advantages.const_data_ptr<T>(), mask.const_data_ptr<bool>(), size,
                        packed.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (logprobs.scalar_type() == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return packed;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> candidates_cuda(
    const at::Tensor& logprobs, const at::Tensor& advantages, const at::Tensor& mask,
    const std::optional<at::Tensor>& excluded, const at::Tensor& trajectory, const at::Tensor& position, int64_t method,
    double mean_logprob, double mean_advantage, double lower, double upper, int64_t seed, int64_t step) {
  check_candidates(logprobs, advantages, mask, excluded, trajectory, position, method);
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const Rule rule{static_cast<Method>(method),
                  mean_logprob,
                  mean_advantage,
                  lower,
                  upper,
                  mix64(mix64(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(step))};
  const int64_t size = logprobs.size(0);
  const at::Tensor key = at::empty({size}, trajectory.options()), id = at::empty({size}, trajectory.options());
  const at::Tensor candidate = at::empty({size}, mask.options());
  if (size == 0) return {key, key, id};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cuda::find_candidates<T>(rule, logprobs.const_data_ptr<T>(), advantages.const_data_ptr<T>(),
                             mask.const_data_ptr<bool>(), excluded ? excluded->const_data_ptr<bool>() : nullptr,
                             trajectory.const_data_ptr<int64_t>(), position.const_data_ptr<int64_t>(), size,
                             key.mutable_data_ptr<int64_t>(), id.mutable_data_ptr<int64_t>(),
                             candidate.mutable_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (logprobs.scalar_type() == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
  const at::Tensor index = at::nonzero(candidate).view({-1});
  return {index, key.index_select(0, index), id.index_select(0, index)};
}

at::Tensor digits_cuda(const at::Tensor& values, int64_t prefix, int64_t shift, int64_t bits,
                       const std::optional<at::Tensor>& among, int64_t among_value) {
  check_digits(values, among, shift, bits);
  const c10::cuda::CUDAGuard guard(values.device());
  const at::Tensor counts = at::zeros({int64_t{1} << bits}, values.options());
  const int64_t size = values.size(0);
  if (size == 0) return counts;
  cuda::count_digits(values.const_data_ptr<int64_t>(), size, static_cast<uint64_t>(prefix), shift, bits,
                     among ? among->const_data_ptr<int64_t>() : nullptr, among_value,
                     counts.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return counts;
}

at::Tensor mark_cuda(const at::Tensor& index, const at::Tensor& key, const at::Tensor& id, int64_t last_key,
                     int64_t last_id, int64_t num_tokens) {
  check_mark(index, key, id, num_tokens);
  const c10::cuda::CUDAGuard guard(index.device());
  const at::Tensor selected = at::zeros({num_tokens}, index.options().dtype(at::kBool));
  const int64_t size = index.size(0);
  if (size == 0) return selected;
  cuda::mark_up_to(key.const_data_ptr<int64_t>(), id.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>(), size,
                   static_cast<uint64_t>(last_key), static_cast<uint64_t>(last_id), selected.mutable_data_ptr<bool>(),
                   c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return selected;
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_rlvr, CUDA, m) {
  m.impl("covariance_sums", &sums_cuda);
  m.impl("selection_candidates", &candidates_cuda);
  m.impl("selection_digits", &digits_cuda);
  m.impl("selection_mark", &mark_cuda);
}

}  // namespace megatron_rlvr::token_selection
