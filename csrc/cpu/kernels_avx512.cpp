// The kernels for AVX-512; compiled with its own -m flags, and only called where isa.cpp finds the CPU able.
#include "vec_avx512.h"
// After vec_avx512.h, which defines Isa:
#include "kernels.inl"

namespace fastgen {

constinit const KernelTable kAvx512Kernels = kernel_table("avx512");

}  // namespace fastgen
