// Macros that let one source serve the CPU kernels of every instruction set and nvcc.
//
// FASTGEN_FN functions have internal linkage: the same header is compiled with different -m flags, and
// the linker must never merge an AVX-512 body into the baseline build.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTGEN_FN static __host__ __device__ __forceinline__
#define FASTGEN_MEMBER __host__ __device__ __forceinline__
#if defined(__CUDA_ARCH__)
#define FASTGEN_UNROLL _Pragma("unroll")
#else
#define FASTGEN_UNROLL
#endif
#else
#if defined(__OPTIMIZE__)  // without it, inlining only makes the compiler's work many times as long
#define FASTGEN_FN static inline __attribute__((always_inline))
#else
#define FASTGEN_FN static inline __attribute__((unused))
#endif
#define FASTGEN_MEMBER inline __attribute__((always_inline))
#if defined(FASTGEN_EMULATED)  // the CUDA kernels, which are unrolled for the sake of registers alone
#define FASTGEN_UNROLL
#else
#define FASTGEN_UNROLL _Pragma("GCC unroll 32")
#endif
#endif
