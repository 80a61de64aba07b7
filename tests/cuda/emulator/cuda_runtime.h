// Stands in for the CUDA toolkit's header: what csrc/cuda names of it, for a C++ compiler.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

namespace fastgen::emulator {
const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
}  // namespace fastgen::emulator

#define threadIdx (::fastgen::emulator::thread_index())
#define blockIdx (::fastgen::emulator::block_index())
#define blockDim (::fastgen::emulator::block_size())
#define gridDim (::fastgen::emulator::grid_size())

using std::max;
using std::min;
