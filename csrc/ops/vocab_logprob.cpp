// Schemas, shared checks, meta and CPU kernels of the vocabulary-parallel log-prob and entropy.
//
//   vocab_logprob_statistics   one read of the logits -> packed statistics of this shard
//   vocab_logprob_merge        statistics of all shards in rank order -> log-prob, entropy, and what backward needs
//   vocab_logprob_gradient(_)  one read of the logits and one write, into a new tensor or over the logits
//
// merge takes the logits only to carry the gradient: megatron_rlvr/ops/native.py registers its autograd formula, and
// the all-gather stands between the first two.

#include "ops/vocab_logprob.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <cstring>
#include <tuple>

#include "ops/cpu/vocab_logprob_kernel.h"
#include "ops/vocab_logprob_checks.h"

namespace megatron_rlvr::vocab_logprob {

namespace {

constexpr double kNegativeInfinity = -INFINITY;

cpu::Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return cpu::Element::kBFloat16;
    case at::kHalf:
      return cpu::Element::kFloat16;
    case at::kFloat:
      return cpu::Element::kFloat32;
    default:
      return cpu::Element::kFloat64;
  }
}

double value_at(const void* row, int64_t column, at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return static_cast<float>(static_cast<const at::BFloat16*>(row)[column]);
    case at::kHalf:
      return static_cast<float>(static_cast<const at::Half*>(row)[column]);
    case at::kFloat:
      return static_cast<const float*>(row)[column];
    default:
      return static_cast<const double*>(row)[column];
  }
}

void write_at(void* row, int64_t column, double value, at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      static_cast<at::BFloat16*>(row)[column] = static_cast<float>(value);
      break;
    case at::kHalf:
      static_cast<at::Half*>(row)[column] = static_cast<float>(value);
      break;
    case at::kFloat:
      static_cast<float*>(row)[column] = static_cast<float>(value);
      break;
    default:
      static_cast<double*>(row)[column] = value;
  }
}

at::Tensor statistics_meta(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& mask,
                           double temperature, int64_t, int64_t num_columns, bool moments) {
  check_shard(logits, targets, mask, temperature, num_columns);
  return at::empty({logits.size(0), moments ? kStatsWithMoments : kStats}, logits.options().dtype(at::kDouble));
}

at::Tensor statistics_cpu(const at::Tensor& logits, const at::Tensor& targets, const std::optional<at::Tensor>& mask,
                          double temperature, int64_t first_column, int64_t num_columns, bool moments) {
  check_shard(logits, targets, mask, temperature, num_columns);
  const int64_t width = moments ? kStatsWithMoments : kStats;
  const at::Tensor out = at::empty({logits.size(0), width}, logits.options().dtype(at::kDouble));
  const auto type = logits.scalar_type();
  const auto element = static_cast<int>(element_of(type));
  const auto kernel = moments ? cpu::kernels().statistics_with_moments[element] : cpu::kernels().statistics[element];
  const char* base = static_cast<const char*>(logits.const_data_ptr());
  const int64_t stride = logits.stride(0) * logits.element_size();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const bool* wanted = mask ? mask->const_data_ptr<bool>() : nullptr;
  double* packed = out.mutable_data_ptr<double>();
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      double* row = packed + t * width;
      const void* x = num_columns > 0 ? base + t * stride : base;  // no memory, no address to move
      if (wanted && !wanted[t]) {
        write_masked(row, width, first_column == 0);
        continue;
      }
      const Statistics s = kernel(x, num_columns, temperature);
      const int64_t column = target[t] - first_column;
      const bool local = column >= 0 && column < num_columns;
      write_statistics(row, s, local ? value_at(x, column, type) : kNegativeInfinity, temperature, moments);
    }
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_meta(const at::Tensor& logits, const at::Tensor& targets,
                                                          const at::Tensor& statistics,
                                                          const std::optional<at::Tensor>& mask, double temperature,
                                                          int64_t, int64_t num_columns, bool) {
  check_shard(logits, targets, mask, temperature, num_columns);
  check_statistics(statistics, logits);
  const int64_t rows = logits.size(0);
  const auto outputs = logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::empty({rows}, outputs), at::empty({rows}, outputs), at::empty({rows, kSaved}, statistics.options())};
}

template <typename Output>
void merge_rows(const at::Tensor& statistics, at::Tensor& logprobs, at::Tensor& entropy, at::Tensor& saved) {
  const int64_t ranks = statistics.size(0), rows = statistics.size(1), width = statistics.size(2);
  const double* packed = statistics.const_data_ptr<double>();
  Output* logprob_of = logprobs.mutable_data_ptr<Output>();
  Output* entropy_of = entropy.mutable_data_ptr<Output>();
  double* saved_of = saved.mutable_data_ptr<double>();
  at::parallel_for(0, rows, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Merged merged = merge_ranks(packed + t * width, ranks, rows * width);
      TORCH_CHECK_VALUE(std::isfinite(merged.max) && std::isfinite(merged.log_sum),
                        "logits_TV must be finite or -inf with a finite maximum in every row, got NaN, +inf or only "
                        "-inf in row ",
                        t);
      logprob_of[t] = static_cast<Output>(merged.logprob);
      entropy_of[t] = static_cast<Output>(merged.entropy);
      saved_of[t * kSaved] = merged.max;
      saved_of[t * kSaved + 1] = merged.log_sum;
      saved_of[t * kSaved + 2] = merged.mean;
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_cpu(const at::Tensor& logits, const at::Tensor& targets,
                                                         const at::Tensor& statistics,
                                                         const std::optional<at::Tensor>& mask, double temperature,
                                                         int64_t first_column, int64_t num_columns, bool inplace) {
  auto [logprobs, entropy, saved] =
      merge_meta(logits, targets, statistics, mask, temperature, first_column, num_columns, inplace);
  const at::Tensor packed = statistics.contiguous();
  if (logprobs.scalar_type() == at::kDouble) {
    merge_rows<double>(packed, logprobs, entropy, saved);
  } else {
    merge_rows<float>(packed, logprobs, entropy, saved);
  }
  return {logprobs, entropy, saved};
}

// Gradient of the logits into `out`, which may be `logits`.
void write_gradient(const at::Tensor& logits, const at::Tensor& out, const at::Tensor& targets, const at::Tensor& saved,
                    const std::optional<at::Tensor>& grad_logprobs, const std::optional<at::Tensor>& grad_entropy,
                    double temperature, int64_t first_column, int64_t num_columns) {
  if (logits.numel() == 0) return;
  const auto type = logits.scalar_type();
  const auto kernel = cpu::kernels().gradient[static_cast<int>(element_of(type))];
  const auto size = static_cast<int64_t>(logits.element_size());
  const char* base = static_cast<const char*>(logits.const_data_ptr());
  char* out_base = static_cast<char*>(out.data_ptr());
  const int64_t stride = logits.stride(0) * size, out_stride = out.stride(0) * size;
  const int64_t columns = logits.size(1);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const double* kept = saved.const_data_ptr<double>();
  const at::Tensor g_logprob = as_doubles(grad_logprobs), g_entropy = as_doubles(grad_entropy);
  const double* g_lp = g_logprob.defined() ? g_logprob.const_data_ptr<double>() : nullptr;
  const double* g_h = g_entropy.defined() ? g_entropy.const_data_ptr<double>() : nullptr;
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const double upstream_lp = g_lp ? g_lp[t] : 0.0, upstream_h = g_h ? g_h[t] : 0.0;
      const void* x = base + t * stride;
      char* g = out_base + t * out_stride;
      if (upstream_lp == 0.0 && upstream_h == 0.0) {
        // Masked tokens: nothing to read.
        std::memset(g, 0, columns * size);
        continue;
      }
      const int64_t column = target[t] - first_column;
      const bool local = column >= 0 && column < num_columns;
      const double x_target = local ? value_at(x, column, type) / temperature : 0.0;
      const double* s = kept + t * kSaved;
      const RowGradient row =
          type == at::kDouble ? row_gradient<double>(s[0], s[1], s[2], x_target, upstream_lp, upstream_h, temperature)
                              : row_gradient<float>(s[0], s[1], s[2], x_target, upstream_lp, upstream_h, temperature);
      kernel(x, g, num_columns, temperature, row);
      std::memset(g + num_columns * size, 0, (columns - num_columns) * size);
      if (local) write_at(g, column, row.target_gradient, type);
    }
  });
}

at::Tensor gradient_meta(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& saved,
                         const std::optional<at::Tensor>& grad_logprobs, const std::optional<at::Tensor>& grad_entropy,
                         double temperature, int64_t, int64_t num_columns) {
  check_shard(logits, targets, std::nullopt, temperature, num_columns);
  check_backward(logits, saved, grad_logprobs, grad_entropy);
  return at::empty_like(logits, at::MemoryFormat::Contiguous);
}

at::Tensor gradient_cpu(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& saved,
                        const std::optional<at::Tensor>& grad_logprobs, const std::optional<at::Tensor>& grad_entropy,
                        double temperature, int64_t first_column, int64_t num_columns) {
  const at::Tensor out =
      gradient_meta(logits, targets, saved, grad_logprobs, grad_entropy, temperature, first_column, num_columns);
  write_gradient(logits, out, targets, saved, grad_logprobs, grad_entropy, temperature, first_column, num_columns);
  return out;
}

void gradient_inplace_meta(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& saved,
                           const std::optional<at::Tensor>& grad_logprobs,
                           const std::optional<at::Tensor>& grad_entropy, double temperature, int64_t,
                           int64_t num_columns) {
  check_shard(logits, targets, std::nullopt, temperature, num_columns);
  check_backward(logits, saved, grad_logprobs, grad_entropy);
  check_rows_apart(logits);
}

void gradient_inplace_cpu(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& saved,
                          const std::optional<at::Tensor>& grad_logprobs, const std::optional<at::Tensor>& grad_entropy,
                          double temperature, int64_t first_column, int64_t num_columns) {
  gradient_inplace_meta(logits, targets, saved, grad_logprobs, grad_entropy, temperature, first_column, num_columns);
  write_gradient(logits, logits, targets, saved, grad_logprobs, grad_entropy, temperature, first_column, num_columns);
}

// Counts the write in the logits' version, so that whoever saved them for its own backward is told.
void gradient_inplace_counted(c10::DispatchKeySet keys, const at::Tensor& logits, const at::Tensor& targets,
                              const at::Tensor& saved, const std::optional<at::Tensor>& grad_logprobs,
                              const std::optional<at::Tensor>& grad_entropy, double temperature, int64_t first_column,
                              int64_t num_columns) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("megatron_rlvr::vocab_logprob_gradient_", "")
                             .typed<decltype(gradient_inplace_cpu)>();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatch(keys & c10::after_ADInplaceOrView_keyset, logits, targets, saved, grad_logprobs, grad_entropy,
                  temperature, first_column, num_columns);
  }
  torch::autograd::impl::bump_version(logits);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rlvr, m) {
  m.def(
      "vocab_logprob_statistics(Tensor logits, Tensor targets, Tensor? mask, float temperature, int first_column, "
      "int num_columns, bool moments=False) -> Tensor");
  m.def(
      "vocab_logprob_merge(Tensor logits, Tensor targets, Tensor statistics, Tensor? mask, float temperature, "
      "int first_column, int num_columns, bool inplace_backward=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "vocab_logprob_gradient(Tensor logits, Tensor targets, Tensor saved, Tensor? grad_logprobs, "
      "Tensor? grad_entropy, float temperature, int first_column, int num_columns) -> Tensor");
  m.def(
      "vocab_logprob_gradient_(Tensor(a!) logits, Tensor targets, Tensor saved, Tensor? grad_logprobs, "
      "Tensor? grad_entropy, float temperature, int first_column, int num_columns) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_rlvr, CPU, m) {
  m.impl("vocab_logprob_statistics", &statistics_cpu);
  m.impl("vocab_logprob_merge", &merge_cpu);
  m.impl("vocab_logprob_gradient", &gradient_cpu);
  m.impl("vocab_logprob_gradient_", &gradient_inplace_cpu);
}

TORCH_LIBRARY_IMPL(megatron_rlvr, Meta, m) {
  m.impl("vocab_logprob_statistics", &statistics_meta);
  m.impl("vocab_logprob_merge", &merge_meta);
  m.impl("vocab_logprob_gradient", &gradient_meta);
  m.impl("vocab_logprob_gradient_", &gradient_inplace_meta);
}

TORCH_LIBRARY_IMPL(megatron_rlvr, ADInplaceOrView, m) {
  m.impl("vocab_logprob_gradient_", &gradient_inplace_counted);
}

}  // namespace megatron_rlvr::vocab_logprob
