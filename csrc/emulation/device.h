// The primitives of ops/cuda/device.h on the host: a CUDA thread is an OS thread, so that a missing barrier is a real
// race that a sanitizer can see. For tests; slow.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define MRLVR_DEVICE inline

namespace megatron_rlvr::device {

constexpr int kWarp = 32;

// Opens when `size` threads have come, any number of times.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t round = round_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++round_;
      opened_.notify_all();
    } else {
      opened_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  const int size_;
  int waiting_ = 0;
  int64_t round_ = 0;
};

struct Warp {
  Barrier barrier{kWarp};
  uint64_t slot[kWarp];
};

// Where the calling OS thread stands in its launch.
struct Position {
  int thread = 0;
  int64_t block = 0;
  Warp* warp = nullptr;
  Barrier* all = nullptr;
};

inline Position& position() {
  static thread_local Position here;
  return here;
}

inline int thread_index() {
  return position().thread;
}
inline int64_t block_index() {
  return position().block;
}
inline void sync_threads() {
  position().all->wait();
}

template <typename T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = *position().warp;
  const int lane = position().thread % kWarp;
  std::memcpy(&warp.slot[lane], &value, sizeof value);
  warp.barrier.wait();
  std::memcpy(&value, &warp.slot[lane ^ mask], sizeof value);
  warp.barrier.wait();
  return value;
}

// Runs `body` for every thread of every block, one block after the other; `between` runs before each block.
template <typename Body, typename Between>
void launch(int64_t blocks, int threads, Body body, Between between) {
  Barrier all(threads);
  std::vector<Warp> warps(threads / kWarp);
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      position() = {thread, 0, &warps[thread / kWarp], &all};
      for (int64_t block = 0; block < blocks; ++block) {
        if (thread == 0) between();
        all.wait();
        position().block = block;
        body();
        all.wait();
      }
    });
  }
  for (std::thread& one : running) one.join();
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float max_nan(float a, float b) {
  return a != a ? a : b != b ? b : a > b ? a : b;
}
inline float fused(float a, float b, float c) {
  return std::fma(a, b, c);
}

struct Vector {
  uint32_t word[4];
};

// Fails like the device on an address that is not a multiple of 16.
inline Vector load_vector(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Vector) != 0) __builtin_trap();
  Vector v;
  std::memcpy(&v, address, sizeof v);
  return v;
}
inline void store_vector(void* address, const Vector& v) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Vector) != 0) __builtin_trap();
  std::memcpy(address, &v, sizeof v);
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <typename T>
struct Words;

struct BFloat16 {
  uint16_t bits;
};

template <>
struct Words<BFloat16> {
  static constexpr int kElements = 2;
  static void unpack(uint32_t word, float* x) {
    x[0] = as_float(word << 16);
    x[1] = as_float(word & 0xffff0000u);
  }
  static uint32_t pack(const float* x) { return uint32_t{round(x[0])} | uint32_t{round(x[1])} << 16; }
  static uint32_t max(uint32_t a, uint32_t b) {
    float x[2], y[2];
    unpack(a, x);
    unpack(b, y);
    for (int i = 0; i < 2; ++i) x[i] = max_nan(x[i], y[i]);
    return pack(x);
  }
  static float one(const BFloat16* x) { return as_float(uint32_t{x->bits} << 16); }
  static void set(BFloat16* x, float value) { x->bits = round(value); }

 private:
  static uint16_t round(float x) {
    const uint32_t bits = as_bits(x);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};

template <>
struct Words<float> {
  static constexpr int kElements = 1;
  static void unpack(uint32_t word, float* x) { x[0] = as_float(word); }
  static uint32_t pack(const float* x) { return as_bits(x[0]); }
  static uint32_t max(uint32_t a, uint32_t b) { return as_bits(max_nan(as_float(a), as_float(b))); }
  static float one(const float* x) { return *x; }
  static void set(float* x, float value) { *x = value; }
};

}  // namespace megatron_rlvr::device
