#include "ops/cpu/vocab_logprob_kernel.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace megatron_rlvr::vocab_logprob::cpu {

namespace {

bool runs(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (std::strcmp(name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return std::strcmp(name, "portable") == 0;
}

const RowKernels* find(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return &avx512_kernels();
  if (std::strcmp(name, "avx2") == 0) return &avx2_kernels();
#endif
  return &portable_kernels();
}

const RowKernels* best() {
  for (const char* name : {"avx512", "avx2"}) {
    if (runs(name)) return find(name);
  }
  return &portable_kernels();
}

std::atomic<const RowKernels*>& current() {
  static std::atomic<const RowKernels*> chosen{best()};
  return chosen;
}

}  // namespace

const RowKernels& kernels() {
  return *current().load();
}

bool select_kernels(const char* name) {
  if (!runs(name)) return false;
  current().store(find(name));
  return true;
}

}  // namespace megatron_rlvr::vocab_logprob::cpu
