// The primitives that kernel bodies are written in: here as CUDA, in emulation/device.h as host C++, so that the same
// bodies run in tests on machines without a GPU.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define MRLVR_DEVICE __device__ __forceinline__

namespace megatron_rlvr::device {

constexpr int kWarp = 32;

MRLVR_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
MRLVR_DEVICE int64_t block_index() {
  return blockIdx.x;
}
MRLVR_DEVICE void sync_threads() {
  __syncthreads();
}

template <typename T>
MRLVR_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 2^x within 2 ulp; 0 where the result is not a normal number.
MRLVR_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger, or NaN if either is.
MRLVR_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

MRLVR_DEVICE float fused(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}

// 16 bytes as four words.
struct Vector {
  uint32_t word[4];
};

MRLVR_DEVICE Vector load_vector(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
}
MRLVR_DEVICE void store_vector(void* address, const Vector& v) {
  *static_cast<uint4*>(address) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// A word is two 16-bit elements or one fp32.
template <typename T>
struct Words;

template <>
struct Words<__nv_bfloat16> {
  static constexpr int kElements = 2;
  MRLVR_DEVICE static void unpack(uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  MRLVR_DEVICE static uint32_t pack(const float* x) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
    return word;
  }
  MRLVR_DEVICE static uint32_t max(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
  MRLVR_DEVICE static float one(const __nv_bfloat16* x) { return __bfloat162float(*x); }
  MRLVR_DEVICE static void set(__nv_bfloat16* x, float value) { *x = __float2bfloat16_rn(value); }
};

template <>
struct Words<__half> {
  static constexpr int kElements = 2;
  MRLVR_DEVICE static void unpack(uint32_t word, float* x) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    x[0] = pair.x;
    x[1] = pair.y;
  }
  MRLVR_DEVICE static uint32_t pack(const float* x) {
    const __half2 pair = __floats2half2_rn(x[0], x[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  MRLVR_DEVICE static uint32_t max(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
  MRLVR_DEVICE static float one(const __half* x) { return __half2float(*x); }
  MRLVR_DEVICE static void set(__half* x, float value) { *x = __float2half_rn(value); }
};

template <>
struct Words<float> {
  static constexpr int kElements = 1;
  MRLVR_DEVICE static void unpack(uint32_t word, float* x) { x[0] = __uint_as_float(word); }
  MRLVR_DEVICE static uint32_t pack(const float* x) { return __float_as_uint(x[0]); }
  MRLVR_DEVICE static uint32_t max(uint32_t a, uint32_t b) {
    return __float_as_uint(max_nan(__uint_as_float(a), __uint_as_float(b)));
  }
  MRLVR_DEVICE static float one(const float* x) { return *x; }
  MRLVR_DEVICE static void set(float* x, float value) { *x = value; }
};

}  // namespace megatron_rlvr::device

#else
#include "emulation/device.h"
#endif
