// The CUDA kernels of vocab_logprob behind the dispatcher. Compiled only with a torch that is built for CUDA.

#include "ops/vocab_logprob.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "ops/cuda/vocab_logprob_kernel.h"
#include "ops/vocab_logprob_checks.h"

namespace megatron_rlvr::vocab_logprob::cuda {

namespace {

Element element_of(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    case at::kFloat:
      return Element::kFloat32;
    default:
      TORCH_CHECK_VALUE(false, "logits_TV must have dtype bfloat16, float16 or float32 on CUDA, got ",
                        logits.scalar_type());
  }
}

Launch launch_of(const at::Tensor& logits, double temperature, int64_t first_column, int64_t num_columns) {
  TORCH_CHECK_VALUE(logits.size(1) <= std::numeric_limits<int>::max(), "logits_TV must have at most 2^31 - 1 columns",
                    ", got ", logits.size(1));
  Launch launch;
  launch.element = element_of(logits);
  launch.rows = logits.size(0);
  launch.columns = num_columns;
  launch.width = logits.size(1);
  launch.stride = logits.stride(0);
  launch.first_column = first_column;
  int multiprocessors = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, static_cast<int>(logits.get_device())));
  launch.splits = splits_for(launch.rows, launch.columns, static_cast<int>(logits.element_size()), multiprocessors);
  TORCH_CHECK_VALUE(launch.rows * launch.splits <= std::numeric_limits<int>::max(),
                    "logits_TV must have fewer rows, got ", launch.rows);
  launch.temperature = temperature;
  launch.stream = c10::cuda::getCurrentCUDAStream().stream();
  return launch;
}

void check_launch(const char* error) {
  TORCH_CHECK(error == nullptr, "CUDA kernel launch: ", error);
}

at::Tensor statistics_cuda(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& mask,
                           double temperature, int64_t first_column, int64_t num_columns, bool moments) {
  check_shard(logits, targets, mask, temperature, num_columns);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Launch launch = launch_of(logits, temperature, first_column, num_columns);
  const int64_t width = moments ? kStatsWithMoments : kStats;
  const auto doubles = logits.options().dtype(at::kDouble);
  const at::Tensor packed = at::empty({launch.rows, width}, doubles);
  const at::Tensor parts = at::empty({launch.splits > 1 ? launch.rows * launch.splits * width : 0}, doubles);
  check_launch(statistics(launch, logits.const_data_ptr(), targets.const_data_ptr<int64_t>(),
                          mask ? mask->const_data_ptr<bool>() : nullptr, moments, parts.mutable_data_ptr<double>(),
                          packed.mutable_data_ptr<double>()));
  return packed;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_cuda(const at::Tensor& logits, const at::Tensor& targets,
                                                          const at::Tensor& statistics,
                                                          const std::optional<at::Tensor>& mask, double temperature,
                                                          int64_t, int64_t num_columns, bool) {
  check_shard(logits, targets, mask, temperature, num_columns);
  check_statistics(statistics, logits);
  element_of(logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor gathered = statistics.contiguous();
  const int64_t rows = logits.size(0);
  const auto floats = logits.options().dtype(at::kFloat);
  const at::Tensor logprobs = at::empty({rows}, floats), entropy = at::empty({rows}, floats);
  const at::Tensor saved = at::empty({rows, kSaved}, gathered.options());
  check_launch(merge(gathered.const_data_ptr<double>(), gathered.size(0), rows, static_cast<int>(gathered.size(2)),
                     logprobs.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(),
                     saved.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream().stream()));
  return {logprobs, entropy, saved};
}

void write_gradient(const at::Tensor& logits, const at::Tensor& out, const at::Tensor& targets, const at::Tensor& saved,
                    const std::optional<at::Tensor>& grad_logprobs, const std::optional<at::Tensor>& grad_entropy,
                    double temperature, int64_t first_column, int64_t num_columns) {
  check_shard(logits, targets, std::nullopt, temperature, num_columns);
  check_backward(logits, saved, grad_logprobs, grad_entropy);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Launch launch = launch_of(logits, temperature, first_column, num_columns);
  const at::Tensor g_logprob = as_doubles(grad_logprobs), g_entropy = as_doubles(grad_entropy);
  const at::Tensor constants = at::empty({launch.rows * row_constants_size()}, logits.options().dtype(at::kByte));
  check_launch(gradient(launch, logits.const_data_ptr(), targets.const_data_ptr<int64_t>(),
                        saved.const_data_ptr<double>(),
                        g_logprob.defined() ? g_logprob.const_data_ptr<double>() : nullptr,
                        g_entropy.defined() ? g_entropy.const_data_ptr<double>() : nullptr, constants.data_ptr(),
                        out.data_ptr(), out.stride(0)));
}

at::Tensor gradient_cuda(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& saved,
                         const std::optional<at::Tensor>& grad_logprobs, const std::optional<at::Tensor>& grad_entropy,
                         double temperature, int64_t first_column, int64_t num_columns) {
  const at::Tensor out = at::empty_like(logits, at::MemoryFormat::Contiguous);
  write_gradient(logits, out, targets, saved, grad_logprobs, grad_entropy, temperature, first_column, num_columns);
  return out;
}

void gradient_inplace_cuda(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& saved,
                           const std::optional<at::Tensor>& grad_logprobs,
                           const std::optional<at::Tensor>& grad_entropy, double temperature, int64_t first_column,
                           int64_t num_columns) {
  check_rows_apart(logits);
  write_gradient(logits, logits, targets, saved, grad_logprobs, grad_entropy, temperature, first_column, num_columns);
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_rlvr, CUDA, m) {
  m.impl("vocab_logprob_statistics", &statistics_cuda);
  m.impl("vocab_logprob_merge", &merge_cuda);
  m.impl("vocab_logprob_gradient", &gradient_cuda);
  m.impl("vocab_logprob_gradient_", &gradient_inplace_cuda);
}

}  // namespace megatron_rlvr::vocab_logprob::cuda
