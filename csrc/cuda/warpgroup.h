// What a device of compute capability 9.0 has beyond device.h: products by four warps at once, which run while the
// warps go on (wgmma), barriers that count arrivals, and registers that one warp gives to another. In files that are
// compiled for sm_90a. The emulated device has these names too.
#pragma once

#include "device.h"

#if defined(FASTGEN_EMULATED)
#include "emulated_warpgroup.h"
#else

namespace fastgen {

// A barrier in shared memory that counts arrivals. Its phases are numbered from 0; one ends with as many arrivals as
// one thread said, before a block_barrier. What was done before an arrival is seen behind a wait for its phase.
__device__ __forceinline__ void init_arrivals(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
// Until the last phase of this parity has ended: the present one, or the one before.
__device__ __forceinline__ void wait_arrivals(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}\n"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// Barriers 1 to 15 of the block, for `threads` threads, whole warps: all arrive, those that wait go on together.
__device__ __forceinline__ void named_barrier_wait(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// named_barrier_wait that tells whether `value` holds for any of the threads.
__device__ __forceinline__ bool named_barrier_any(int number, int threads, bool value) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred one, all;\n"
      "setp.ne.u32 one, %3, 0;\n"
      "bar.red.or.pred all, %1, %2, one;\n"
      "selp.u32 %0, 1, 0, all;\n}\n"
      : "=r"(any)
      : "r"(number), "r"(threads), "r"(uint32_t(value))
      : "memory");
  return any != 0;
}

// The thread's number in its warp, read anew: what comes of it does not fill registers from long before.
__device__ __forceinline__ int lane_now() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane));
  return lane;
}

// Registers of a thread, from here on; all warps of a warpgroup call. More are waited for until others have less.
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Products by a warpgroup, four warps of which the first one's number is divisible by 4. They are asynchronous: what
// they read must stay as it is, and their sums are not to be touched, until a wait. In order:
//   fence_shared       by who wrote their operands to shared memory, before it tells that they are there
//   warpgroup_fence    before products, of all their sums and left sides
//   warpgroup_multiply_add, any number of times
//   warpgroup_commit   makes a group of them
//   warpgroup_wait     until all groups but the last kPending are done, with the sums that are there then and the left
//                      sides that may be written to again
// All four warps come to the same of these calls: none stands in a branch that a warp takes for itself.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

namespace detail {
// To the compiler, what may read and write registers: it moves nothing across that touches them.
__device__ __forceinline__ void touch(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
__device__ __forceinline__ void touch(uint32_t& left) { asm volatile("" : "+r"(left)::"memory"); }
template <class T, int kCount>
__device__ __forceinline__ void touch(T (&registers)[kCount]) {
  FASTGEN_UNROLL
  for (int i = 0; i < kCount; ++i) touch(registers[i]);
}
}  // namespace detail

template <class... Registers>
__device__ __forceinline__ void warpgroup_fence(Registers&... registers) {
  (detail::touch(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
template <int kPending, class... Registers>
__device__ __forceinline__ void warpgroup_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
  (detail::touch(registers), ...);
}

// d = a b, or with `add` d += a b: a (64, 16), warp w of the group having rows 16 w to 16 w + 15 as multiply_add takes
// them; b (16, 8 kCount) in shared memory (matrix_descriptor), its columns there or, with kRows, its rows; d, by warp,
// kCount results of multiply_add side by side.
template <class Half, bool kRows, int kCount>
__device__ __forceinline__ void warpgroup_multiply_add(float (&d)[kCount][4], const uint32_t (&a)[4], uint64_t b,
                                                       bool add);
#define FASTGEN_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FASTGEN_SUMS_8                                                                                  \
  FASTGEN_FOUR(0), FASTGEN_FOUR(1), FASTGEN_FOUR(2), FASTGEN_FOUR(3), FASTGEN_FOUR(4), FASTGEN_FOUR(5), \
      FASTGEN_FOUR(6), FASTGEN_FOUR(7)
#define FASTGEN_SUMS_16                                                                                   \
  FASTGEN_SUMS_8, FASTGEN_FOUR(8), FASTGEN_FOUR(9), FASTGEN_FOUR(10), FASTGEN_FOUR(11), FASTGEN_FOUR(12), \
      FASTGEN_FOUR(13), FASTGEN_FOUR(14), FASTGEN_FOUR(15)
#define FASTGEN_NUMBERS_32                                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTGEN_NUMBERS_64                                                                                      \
  FASTGEN_NUMBERS_32                                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Operands behind the sums: a, b, add, kRows.
#define FASTGEN_WARPGROUP_MULTIPLY_ADD(Half, type, kRows, kCount, columns, sums, numbers, a0, a1, a2, a3, of_b,      \
                                       of_add, rows)                                                                 \
  template <>                                                                                                        \
  __device__ __forceinline__ void warpgroup_multiply_add<Half, kRows, kCount>(                                       \
      float (&d)[kCount][4], const uint32_t (&a)[4], uint64_t b, bool add) {                                         \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " of_add                                                      \
                 ", 0;\n"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" numbers "}, {" a0 ", " a1 \
                 ", " a2 ", " a3 "}, " of_b ", add, 1, 1, " rows ";\n}\n"                                            \
                 : sums                                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kRows))                \
                 : "memory");                                                                                        \
  }
#define FASTGEN_WARPGROUP_8(Half, type, kRows)                                                                        \
  FASTGEN_WARPGROUP_MULTIPLY_ADD(Half, type, kRows, 8, "64", FASTGEN_SUMS_8, FASTGEN_NUMBERS_32, "%32", "%33", "%34", \
                                 "%35", "%36", "%37", "%38")
#define FASTGEN_WARPGROUP_16(Half, type, kRows)                                                                   \
  FASTGEN_WARPGROUP_MULTIPLY_ADD(Half, type, kRows, 16, "128", FASTGEN_SUMS_16, FASTGEN_NUMBERS_64, "%64", "%65", \
                                 "%66", "%67", "%68", "%69", "%70")
FASTGEN_WARPGROUP_8(BFloat16, "bf16", false)
FASTGEN_WARPGROUP_8(BFloat16, "bf16", true)
FASTGEN_WARPGROUP_16(BFloat16, "bf16", true)
FASTGEN_WARPGROUP_8(Float16, "f16", false)
FASTGEN_WARPGROUP_8(Float16, "f16", true)
FASTGEN_WARPGROUP_16(Float16, "f16", true)
#undef FASTGEN_WARPGROUP_16
#undef FASTGEN_WARPGROUP_8
#undef FASTGEN_WARPGROUP_MULTIPLY_ADD
#undef FASTGEN_NUMBERS_64
#undef FASTGEN_NUMBERS_32
#undef FASTGEN_SUMS_16
#undef FASTGEN_SUMS_8
#undef FASTGEN_FOUR

}  // namespace fastgen

#endif  // FASTGEN_EMULATED

namespace fastgen {

// A matrix in shared memory, as products of a warpgroup read it (PTX ISA, "Matrix descriptor format"): in blocks of 8
// rows of 128 bytes, each at an address that 1024 divides, in which the 16 bytes number p of row r stand at place
// p ^ r. stride: bytes from a block to the one below. leading: from a block to the one beside it, where a product
// goes across, which it does only along rows.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* first, uint32_t stride, uint32_t leading) {
  constexpr uint64_t kSwizzle128 = 1;
  return uint64_t((shared_address(first) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         kSwizzle128 << 62;
}
// The same matrix, so many bytes behind; the blocks stand where they stood.
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, int bytes) {
  return descriptor + (uint32_t(bytes) >> 4);
}

}  // namespace fastgen
