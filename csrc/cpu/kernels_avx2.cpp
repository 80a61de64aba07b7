// The kernels for AVX2; compiled with its own -m flags, and only called where isa.cpp finds the CPU able.
#include "vec_avx2.h"
// After vec_avx2.h, which defines Isa:
#include "kernels.inl"

namespace fastgen {

constinit const KernelTable kAvx2Kernels = kernel_table("avx2");

}  // namespace fastgen
