// Recurrent layers, attention and activations of bfloat16 on a CPU that multiplies pairs of it and rounds to it;
// everything else is as in kernels_avx512.cpp. Compiled with its own -m flags, and only called where isa.cpp finds the
// CPU able.
#include "kernel_table.h"
#include "vec_avx512_bf16.h"
// After vec_avx512_bf16.h, which defines Isa:
#include "activation.inl"
#include "attention_backward.inl"
#include "attention_few_backward.inl"
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

// A few queries are bound by the bytes of the keys and stay with the widened kernel.
namespace {
bool in_pairs(const AttentionParams& p) { return p.dtype == DType::kBFloat16 && !AttentionFew<BFloat16>::serves(p); }
bool in_pairs(const AttentionBackwardParams& p) {
  return p.dtype == DType::kBFloat16 && !AttentionFewBackward<BFloat16>::serves(p);
}
}  // namespace

AttentionSizes attention_sizes_bf16(const AttentionParams& p) {
  return in_pairs(p) ? AttentionForward<MultiplyPairs>(p).sizes() : kAvx512Kernels.attention_sizes(p);
}
void attention_bf16(const AttentionParams& p, AttentionPhase phase, int64_t unit, void* scratch) {
  if (!in_pairs(p)) return kAvx512Kernels.attention(p, phase, unit, scratch);
  AttentionForward<MultiplyPairs>(p).run(unit, scratch);
}
AttentionBackwardSizes attention_backward_sizes_bf16(const AttentionBackwardParams& p) {
  if (!in_pairs(p)) return kAvx512Kernels.attention_backward_sizes(p);
  return AttentionBackward<MultiplyPairs>(p).sizes();
}
void attention_backward_bf16(const AttentionBackwardParams& p, AttentionBackwardPhase phase, int64_t unit,
                             void* scratch) {
  if (!in_pairs(p)) return kAvx512Kernels.attention_backward(p, phase, unit, scratch);
  AttentionBackward<MultiplyPairs>(p).run(phase, unit, scratch);
}

// The arithmetic is the same; to round a result takes one instruction in the place of eight.
void activation_bf16(const ActivationParams& p, int64_t begin, int64_t end) {
  if (p.dtype != DType::kBFloat16) return kAvx512Kernels.activation(p, begin, end);
  ActivationRows<BFloat16>(p).forward(begin, end);
}
void activation_backward_bf16(const ActivationBackwardParams& p, int64_t begin, int64_t end) {
  if (p.dtype != DType::kBFloat16) return kAvx512Kernels.activation_backward(p, begin, end);
  ActivationRows<BFloat16>(p).backward(p, begin, end);
}

}  // namespace fastgen
