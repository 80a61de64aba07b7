// What kernels use of a CUDA device beyond plain C++, and launches. Kernels are written against these names alone, so
// that tests/cuda/emulator can stand in for the device and run them, compiled as C++, where there is no GPU.
#pragma once

#include <cuda_runtime.h>

#include "../common/dtype.h"

#if defined(FASTGEN_EMULATED)
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <tuple>
#include <utility>

#include "check.h"

namespace fastgen {

// The block's dynamic shared memory: kernels have no other. It begins where 1024 divides the address.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Of a whole warp: all its 32 threads call together.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T value, int by) {
  return __shfl_down_sync(0xffffffffu, value, by);
}
__device__ __forceinline__ bool warp_any(bool value) { return __any_sync(0xffffffffu, value) != 0; }

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, both aligned to that, or zeros where they are not `there`: then nothing is
// read. They have arrived after a wait, for other threads after a barrier behind it.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until all committed groups but the last kPending have arrived.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of halves from shared memory: threads 8 i to 8 i + 7 give the addresses of the rows of matrix i,
// each 16 bytes; of each matrix, thread t receives row t / 4, columns 2 (t % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b by a warp: a (16, 16) in rows, b (16, 8) in columns, d (16, 8). With g = t / 4, c = 2 (t % 4), thread t has
//   a: rows g, g + 8, g, g + 8 at columns c, c, c + 8, c + 8, and the next column of each
//   b: rows c, c + 1 and c + 8, c + 9 of column g
//   d: rows g, g, g + 8, g + 8 at columns c, c + 1, c, c + 1
template <class Half>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define FASTGEN_MULTIPLY_ADD(Half, type)                                                                              \
  template <>                                                                                                         \
  __device__ __forceinline__ void multiply_add<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                             \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                 \
  }
FASTGEN_MULTIPLY_ADD(BFloat16, "bf16")
FASTGEN_MULTIPLY_ADD(Float16, "f16")
#undef FASTGEN_MULTIPLY_ADD

// Two numbers as halves of one register, rounded to nearest even, the first in the low bits; and back.
template <class Half>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<Half, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}
template <class Half>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<Half, BFloat16>) {
    return {float_of(bits << 16), float_of(bits & 0xffff0000u)};
  } else {
    __half2 pair;
    memcpy(&pair, &bits, sizeof pair);
    return __half22float2(pair);
  }
}

// 2^x and log2 x to about two units in the last place, subnormal numbers as 0; 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Flags between blocks: what a thread wrote before a release is seen by who acquires the number it left.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t add_release(uint32_t* p, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;\n" : "=r"(before) : "l"(p), "r"(value) : "memory");
  return before;
}

// Adds to a whole number in this block's shared memory, and gives what it was before. The order makes no difference to
// the sum.
__device__ __forceinline__ uint32_t add_shared(uint32_t* p, uint32_t value) { return atomicAdd(p, value); }

// A cluster: neighbouring blocks of a launch that reach into each other's shared memory. Where there are none, before
// compute capability 9.0, a block is one by itself.
//
// Where all threads of a cluster meet. What any of them wrote before is seen by all behind it.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
#else
  block_barrier();
#endif
}
// The same place in the shared memory of block `rank` of the cluster, which must have begun and not have ended.
template <class T>
__device__ __forceinline__ T* in_block_of_cluster(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  T* there;
  asm("mapa.u64 %0, %1, %2;\n" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
#else
  return shared;
#endif
}

namespace detail {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  FASTGEN_CUDA_CHECK(cudaGetDevice(&device));
  FASTGEN_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// More than 48 KB of dynamic shared memory must be asked for: always all there is, as other threads may be about to
// launch the same kernel with another size.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const auto* function = reinterpret_cast<const void*>(kernel);
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  FASTGEN_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

}  // namespace detail

// kernel<<<grid, block, shared, stream>>>(args...), with an error where it cannot be launched.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const Args&... args) {
  detail::allow_shared(kernel, shared);
  // clang-format off
  kernel<<<grid, block, shared, stream>>>(args...);
  // clang-format on
  FASTGEN_CUDA_CHECK(cudaGetLastError());
}

// The same with all blocks running at once, or an error: they may wait for each other.
template <class... Params, class... Args>
void launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                        const Args&... args) {
  detail::allow_shared(kernel, shared);
  std::tuple<Params...> values(args...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        FASTGEN_CUDA_CHECK(
            cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared, stream));
      },
      values);
}

namespace detail {

// A launch of all blocks at once, in clusters.
struct ClusterLaunch {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(dim3 grid, int cluster, dim3 block, size_t shared, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(cluster), 1, 1};
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

}  // namespace detail

// launch_cooperative in clusters of so many blocks.
template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), dim3 grid, int cluster, dim3 block, size_t shared, cudaStream_t stream,
                     const Args&... args) {
  detail::allow_shared(kernel, shared);
  const detail::ClusterLaunch launch(grid, cluster, block, shared, stream);
  FASTGEN_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, Params(args)...));
}

// Of the current device.
inline int compute_capability() {  // 90: 9.0
  return 10 * detail::device_attribute(cudaDevAttrComputeCapabilityMajor) +
         detail::device_attribute(cudaDevAttrComputeCapabilityMinor);
}
inline int multiprocessors() { return detail::device_attribute(cudaDevAttrMultiProcessorCount); }
inline size_t shared_limit() { return size_t(detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }
template <class Kernel>
int blocks_per_multiprocessor(Kernel kernel, int threads, size_t shared) {
  detail::allow_shared(kernel, shared);
  int blocks = 0;
  FASTGEN_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared));
  return blocks;
}

// How many clusters run at once: none where the kernel was compiled for an older device, though as PTX it may run here.
template <class Kernel>
int clusters_at_once(Kernel kernel, int cluster, int threads, size_t shared) {
  if (compute_capability() < 90) return 0;
  cudaFuncAttributes of{};
  FASTGEN_CUDA_CHECK(cudaFuncGetAttributes(&of, reinterpret_cast<const void*>(kernel)));
  if (of.ptxVersion < 90) return 0;  // __CUDA_ARCH__ / 10: what cluster_barrier was compiled to
  detail::allow_shared(kernel, shared);
  detail::ClusterLaunch launch(unsigned(cluster), cluster, unsigned(threads), shared, nullptr);
  launch.config.numAttrs = 1;  // that they are launched together is no matter of their number
  int clusters = 0;
  FASTGEN_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &launch.config));
  return clusters;
}

}  // namespace fastgen

#endif  // FASTGEN_EMULATED

namespace fastgen {

// Elements that are read or written in one access, at an address that its size divides.
template <class Storage, int N>
struct alignas(sizeof(Storage) * N) Pack {
  Storage v[N];
};

// Where all threads of so many blocks of a cooperative launch meet; `arrived` is theirs alone, and 0 before the launch.
// What any of them wrote before is seen by all behind it.
class GridBarrier {
 public:
  __device__ GridBarrier(uint32_t* arrived, int blocks) : arrived_(arrived), blocks_(uint32_t(blocks)) {}
  __device__ void wait() {
    block_barrier();
    goal_ += blocks_;
    if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
      add_release(arrived_, 1);
      while (int32_t(load_acquire(arrived_) - goal_) < 0) {  // the count may wrap
      }
    }
    block_barrier();
  }

 private:
  uint32_t* arrived_;
  uint32_t blocks_, goal_ = 0;
};

}  // namespace fastgen
