// The names of csrc/cuda/device.h on the emulated device (emulator.cpp).
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "cuda_runtime.h"

namespace fastgen {
namespace emulator {

// Runs `kernel` once for each thread of a grid. Blocks one after the other, or, where they wait for each other, at
// once, `cluster` of them in a cluster.
void run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared, bool cooperative, int cluster = 1);

constexpr int kLanes = 32;
// Waits until all threads of the warp are here with the same `kind`; the last of them runs `compute` on what each gave
// (inputs[lane]) for what each receives (outputs[lane]).
void with_warp(const char* kind, const void* input, void* output,
               const std::function<void(const void* const* inputs, void* const* outputs)>& compute);
int lane();
unsigned char* shared_memory();
void block_barrier();
void cluster_barrier();
unsigned char* shared_memory_of(int rank, const void* p);   // of a block of the cluster; p: in this block's own
void yield();                                               // to other threads, while this one waits for a flag
void copy_async(void* to, const void* from, size_t bytes);  // from null: zeros
void copy_async_commit();
void copy_async_wait(int pending);
void check_shared(const void* p, size_t bytes, size_t alignment);  // that it lies in this block's shared memory

uint32_t shared_address(const void* p);  // from where this block's shared memory begins

int compute_capability();
int multiprocessors();
size_t shared_limit();

template <class T>
T exchange(const char* kind, T value, const std::function<int(int lane)>& from) {
  T result;
  with_warp(kind, &value, &result, [&](const void* const* inputs, void* const* outputs) {
    for (int i = 0; i < kLanes; ++i) {
      const int source = from(i);
      *static_cast<T*>(outputs[i]) = *static_cast<const T*>(inputs[source >= 0 && source < kLanes ? source : i]);
    }
  });
  return result;
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  check_shared(row, 16, 16);
  with_warp(transposed ? "load_matrices_transposed" : "load_matrices", row, r,
            [&](const void* const* rows, void* const* outputs) {
              for (int t = 0; t < kLanes; ++t) {
                for (int matrix = 0; matrix < 4; ++matrix) {
                  uint16_t pair[2];
                  for (int i = 0; i < 2; ++i) {
                    const int along = t / 4, across = 2 * (t % 4) + i;
                    const void* of = rows[8 * matrix + (transposed ? across : along)];
                    pair[i] = static_cast<const uint16_t*>(of)[transposed ? along : across];
                  }
                  memcpy(static_cast<uint32_t*>(outputs[t]) + matrix, pair, sizeof pair);
                }
              }
            });
}

}  // namespace emulator

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }
inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }
inline void block_barrier() { emulator::block_barrier(); }
inline void cluster_barrier() { emulator::cluster_barrier(); }
template <class T>
T* in_block_of_cluster(T* shared, int rank) {
  const auto at = reinterpret_cast<unsigned char*>(shared) - emulator::shared_memory();
  return reinterpret_cast<T*>(emulator::shared_memory_of(rank, shared) + at);
}
inline void warp_barrier() {
  emulator::with_warp("warp_barrier", nullptr, nullptr, [](const void* const*, void* const*) {});
}

// A shuffle whose lanes disagree on their argument takes that of the lane that receives.
template <class T>
T shuffle(T value, int lane) {
  struct Given {
    T value;
    int lane;
  } given{value, lane};
  T result;
  emulator::with_warp("shuffle", &given, &result, [](const void* const* inputs, void* const* outputs) {
    for (int i = 0; i < emulator::kLanes; ++i) {
      const int from = static_cast<const Given*>(inputs[i])->lane & (emulator::kLanes - 1);
      *static_cast<T*>(outputs[i]) = static_cast<const Given*>(inputs[from])->value;
    }
  });
  return result;
}
template <class T>
T shuffle_xor(T value, int mask) {
  return emulator::exchange<T>("shuffle_xor", value, [mask](int lane) { return lane ^ mask; });
}
template <class T>
T shuffle_down(T value, int by) {
  return emulator::exchange<T>("shuffle_down", value, [by](int lane) { return lane + by; });
}
inline bool warp_any(bool value) {
  bool result = false;
  emulator::with_warp("warp_any", &value, &result, [](const void* const* inputs, void* const* outputs) {
    bool any = false;
    for (int i = 0; i < emulator::kLanes; ++i) any |= *static_cast<const bool*>(inputs[i]);
    for (int i = 0; i < emulator::kLanes; ++i) *static_cast<bool*>(outputs[i]) = any;
  });
  return result;
}

inline void copy_async16(void* shared, const void* global, bool there = true) {
  emulator::check_shared(shared, 16, 16);
  emulator::copy_async(shared, there ? global : nullptr, 16);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulator::load_matrices(r, row, true); }

template <class Half>
uint32_t pack(float low, float high) {
  Half pair[2];
  narrow(low, &pair[0]);
  narrow(high, &pair[1]);
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}
template <class Half>
float2 unpack(uint32_t bits) {
  Half pair[2];
  memcpy(pair, &bits, sizeof bits);
  return {widen(pair[0]), widen(pair[1])};
}

template <class Half>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Given {
    const float* d;
    const uint32_t *a, *b;
  } given{d, a, b};
  emulator::with_warp("multiply_add", &given, d, [](const void* const* inputs, void* const* outputs) {
    float left[16][16], right[16][8], sums[16][8];
    for (int t = 0; t < emulator::kLanes; ++t) {
      const Given& of = *static_cast<const Given*>(inputs[t]);
      const int g = t / 4, c = 2 * (t % 4);
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<Half>(of.a[i]);
        left[g + i % 2 * 8][c + i / 2 * 8] = pair.x;
        left[g + i % 2 * 8][c + i / 2 * 8 + 1] = pair.y;
        sums[g + i / 2 * 8][c + i % 2] = of.d[i];
      }
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack<Half>(of.b[i]);
        right[c + 8 * i][g] = pair.x;
        right[c + 8 * i + 1][g] = pair.y;
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int t = 0; t < emulator::kLanes; ++t) {
      const int g = t / 4, c = 2 * (t % 4);
      for (int i = 0; i < 4; ++i) static_cast<float*>(outputs[t])[i] = sums[g + i / 2 * 8][c + i % 2];
    }
  });
}

namespace emulator {
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
}  // namespace emulator
inline float exp2_approx(float x) { return emulator::flushed(std::exp2(emulator::flushed(x))); }
inline float log2_approx(float x) { return std::log2(emulator::flushed(x)); }

// One thread of the emulated device runs at a time: plain memory is in order.
inline uint32_t load_acquire(const uint32_t* p) {
  emulator::yield();
  return *p;
}
inline void store_release(uint32_t* p, uint32_t value) { *p = value; }
inline uint32_t add_release(uint32_t* p, uint32_t value) {
  const uint32_t before = *p;
  *p += value;
  return before;
}

inline uint32_t add_shared(uint32_t* p, uint32_t value) {
  emulator::check_shared(p, sizeof *p, sizeof *p);
  return add_release(p, value);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t, const Args&... args) {
  const std::tuple<Params...> values(args...);
  emulator::run([&] { std::apply(kernel, values); }, grid, block, shared, false);
}
template <class... Params, class... Args>
void launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                        const Args&... args) {
  const std::tuple<Params...> values(args...);
  emulator::run([&] { std::apply(kernel, values); }, grid, block, shared, true);
}

inline int compute_capability() { return emulator::compute_capability(); }
template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), dim3 grid, int cluster, dim3 block, size_t shared, cudaStream_t,
                     const Args&... args) {
  const std::tuple<Params...> values(args...);
  emulator::run([&] { std::apply(kernel, values); }, grid, block, shared, true, cluster);
}

inline int multiprocessors() { return emulator::multiprocessors(); }
inline size_t shared_limit() { return emulator::shared_limit(); }
template <class Kernel>
int blocks_per_multiprocessor(Kernel, int threads, size_t shared) {
  return int(std::min<size_t>(2048 / size_t(threads), shared_limit() / std::max<size_t>(shared, 1024)));
}

template <class Kernel>
int clusters_at_once(Kernel kernel, int cluster, int threads, size_t shared) {
  if (compute_capability() < 90) return 0;
  return blocks_per_multiprocessor(kernel, threads, shared) * multiprocessors() / cluster;
}

}  // namespace fastgen
