// Atomic additions of kernel bodies, on the device and in the host emulation. Integers only, so that no order matters.
#pragma once

#include <cstdint>

#include "ops/cuda/device.h"

namespace megatron_rlvr::device {

#if defined(__CUDACC__)
MRLVR_DEVICE void atomic_add(uint64_t* counter, uint64_t value) {
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t));
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(value));
}
MRLVR_DEVICE void atomic_add(uint32_t* counter, uint32_t value) {
  atomicAdd(counter, value);
}
#else
template <typename T>
void atomic_add(T* counter, T value) {
  __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}
#endif

}  // namespace megatron_rlvr::device
