// Schemas, meta and CPU kernels of the token selection.
//
//   covariance_sums        one pass -> exact sums of log pi, A and log pi A, ready for one all-reduce
//   selection_candidates   one pass -> (token, key, id) of the tokens that may be selected
//   selection_digits       histogram of one radix digit of keys or ids, ready for an all-reduce
//   selection_mark         the mask of the candidates up to the last selected (key, id)
//
// megatron_rlvr/ops/native_tokens.py puts the collectives between them.

#include "ops/token_selection.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "ops/cpu/token_selection_kernel.h"
#include "ops/token_selection_checks.h"

namespace megatron_rlvr::token_selection {

namespace {

using Candidates = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::Tensor sums_meta(const at::Tensor& logprobs, const at::Tensor& advantages, const at::Tensor& mask) {
  check_tokens(logprobs, advantages, mask);
  return at::empty({kPacked}, logprobs.options().dtype(at::kLong));
}

at::Tensor sums_cpu(const at::Tensor& logprobs, const at::Tensor& advantages, const at::Tensor& mask) {
  const at::Tensor packed = sums_meta(logprobs, advantages, mask);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    cpu::exact_sums<T>(logprobs.const_data_ptr<T>(), advantages.const_data_ptr<T>(), mask.const_data_ptr<bool>(),
                       logprobs.size(0), packed.mutable_data_ptr<int64_t>());
  };
  if (logprobs.scalar_type() == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return packed;
}

at::Tensor to_tensor(const std::vector<int64_t>& values, const at::Tensor& like) {
  const at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, like.options().dtype(at::kLong));
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<int64_t>());
  return out;
}

Candidates candidates_cpu(const at::Tensor& logprobs, const at::Tensor& advantages, const at::Tensor& mask,
                          const std::optional<at::Tensor>& excluded, const at::Tensor& trajectory,
                          const at::Tensor& position, int64_t method, double mean_logprob, double mean_advantage,
                          double lower, double upper, int64_t seed, int64_t step) {
  check_candidates(logprobs, advantages, mask, excluded, trajectory, position, method);
  const Rule rule{static_cast<Method>(method),
                  mean_logprob,
                  mean_advantage,
                  lower,
                  upper,
                  mix64(mix64(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(step))};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return cpu::find_candidates<T>(rule, logprobs.const_data_ptr<T>(), advantages.const_data_ptr<T>(),
                                   mask.const_data_ptr<bool>(), excluded ? excluded->const_data_ptr<bool>() : nullptr,
                                   trajectory.const_data_ptr<int64_t>(), position.const_data_ptr<int64_t>(),
                                   logprobs.size(0));
  };
  const cpu::Candidates found = logprobs.scalar_type() == at::kDouble ? run(0.0) : run(0.0f);
  return {to_tensor(found.index, logprobs), to_tensor(found.key, logprobs), to_tensor(found.id, logprobs)};
}

at::Tensor digits_meta(const at::Tensor& values, int64_t, int64_t shift, int64_t bits,
                       const std::optional<at::Tensor>& among, int64_t) {
  check_digits(values, among, shift, bits);
  return at::empty({int64_t{1} << bits}, values.options());
}

at::Tensor digits_cpu(const at::Tensor& values, int64_t prefix, int64_t shift, int64_t bits,
                      const std::optional<at::Tensor>& among, int64_t among_value) {
  check_digits(values, among, shift, bits);
  const at::Tensor counts = at::zeros({int64_t{1} << bits}, values.options());
  cpu::count_digits(values.const_data_ptr<int64_t>(), values.size(0), static_cast<uint64_t>(prefix), shift, bits,
                    among ? among->const_data_ptr<int64_t>() : nullptr, among_value,
                    counts.mutable_data_ptr<int64_t>());
  return counts;
}

at::Tensor mark_meta(const at::Tensor& index, const at::Tensor& key, const at::Tensor& id, int64_t, int64_t,
                     int64_t num_tokens) {
  check_mark(index, key, id, num_tokens);
  return at::empty({num_tokens}, index.options().dtype(at::kBool));
}

at::Tensor mark_cpu(const at::Tensor& index, const at::Tensor& key, const at::Tensor& id, int64_t last_key,
                    int64_t last_id, int64_t num_tokens) {
  const at::Tensor selected = mark_meta(index, key, id, last_key, last_id, num_tokens).zero_();
  cpu::mark_up_to(key.const_data_ptr<int64_t>(), id.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>(),
                  index.size(0), static_cast<uint64_t>(last_key), static_cast<uint64_t>(last_id),
                  selected.mutable_data_ptr<bool>());
  return selected;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_rlvr, m) {
  m.def("covariance_sums(Tensor logprobs, Tensor advantages, Tensor mask) -> Tensor");
  m.def(
      "selection_candidates(Tensor logprobs, Tensor advantages, Tensor mask, Tensor? excluded, Tensor trajectory, "
      "Tensor position, int method, float mean_logprob, float mean_advantage, float lower, float upper, int seed, "
      "int step) -> (Tensor, Tensor, Tensor)");
  m.def(
      "selection_digits(Tensor values, int prefix, int shift, int bits, Tensor? among=None, int among_value=0) -> "
      "Tensor");
  m.def("selection_mark(Tensor index, Tensor key, Tensor id, int last_key, int last_id, int num_tokens) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_rlvr, CPU, m) {
  m.impl("covariance_sums", &sums_cpu);
  m.impl("selection_candidates", &candidates_cpu);
  m.impl("selection_digits", &digits_cpu);
  m.impl("selection_mark", &mark_cpu);
}

// selection_candidates has none: the number of candidates depends on the data.
TORCH_LIBRARY_IMPL(megatron_rlvr, Meta, m) {
  m.impl("covariance_sums", &sums_meta);
  m.impl("selection_digits", &digits_meta);
  m.impl("selection_mark", &mark_meta);
}

}  // namespace megatron_rlvr::token_selection
