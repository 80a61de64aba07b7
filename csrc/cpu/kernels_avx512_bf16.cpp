// The recurrent layers of bfloat16 on a CPU that multiplies pairs of it; everything else is as in
// kernels_avx512.cpp. Compiled with its own -m flags, and only called where isa.cpp finds the CPU able.
#include "kernel_table.h"
#include "vec_avx512_bf16.h"
// After vec_avx512_bf16.h, which defines Isa:
#include "probe.inl"
#include "recurrent_backward.inl"

namespace fastgen {

double multiply_adds_bf16(int64_t count) { return multiply_adds<MultiplyPairs>(count); }

RecurrentSizes recurrent_sizes_bf16(const RecurrentParams& p, int64_t rows) {
  if (p.dtype != DType::kBFloat16) return kAvx512Kernels.recurrent_sizes(p, rows);
  RecurrentSizes sizes{};
  with_mode<BFloat16, MultiplyPairs>(p, [&](const auto& kernel) { sizes = kernel.sizes(rows); });
  return sizes;
}
void recurrent_bf16(const RecurrentParams& p, const RecurrentWork& work) {
  if (p.dtype != DType::kBFloat16) return kAvx512Kernels.recurrent(p, work);
  with_mode<BFloat16, MultiplyPairs>(p, [&](const auto& kernel) { kernel.run(work); });
}
RecurrentBackwardSizes recurrent_backward_sizes_bf16(const RecurrentBackwardParams& p, int64_t rows) {
  if (p.dtype != DType::kBFloat16) return kAvx512Kernels.recurrent_backward_sizes(p, rows);
  RecurrentBackwardSizes sizes{};
  with_mode<BFloat16, MultiplyPairs>(p, [&](const auto& kernel) { sizes = kernel.sizes(rows); });
  return sizes;
}
void recurrent_backward_bf16(const RecurrentBackwardParams& p, const RecurrentBackwardWork& work) {
  if (p.dtype != DType::kBFloat16) return kAvx512Kernels.recurrent_backward(p, work);
  with_mode<BFloat16, MultiplyPairs>(p, [&](const auto& kernel) { kernel.run(work); });
}

}  // namespace fastgen
