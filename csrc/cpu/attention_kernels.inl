// The attention kernels of an instruction set, by the dtype of a call.
#pragma once

#include "attention_backward.inl"
#include "attention_few.inl"
#include "attention_few_backward.inl"

namespace fastgen {
namespace {

// Calls body with the arithmetic of a dtype.
template <class Body>
FASTGEN_FN void with_arithmetic(DType dtype, const Body& body) {
  if (dtype == DType::kFloat64) return body(Multiply<double>());
  body(Multiply<float>());
}

// Calls body(kernel) with the kernel that serves the call.
template <class Body>
FASTGEN_FN void with_attention(const AttentionParams& p, const Body& body) {
  if (AttentionFew<float>::serves(p)) {
    with_storage(p.dtype, [&](auto number) { body(AttentionFew<decltype(number)>(p)); });
  } else {
    with_arithmetic(p.dtype, [&](auto a) { body(AttentionForward<decltype(a)>(p)); });
  }
}

AttentionSizes attention_sizes(const AttentionParams& p) {
  AttentionSizes sizes{};
  with_attention(p, [&](const auto& kernel) { sizes = kernel.sizes(); });
  return sizes;
}
void attention(const AttentionParams& p, AttentionPhase phase, int64_t unit, void* scratch) {
  with_attention(
      p, [&](const auto& kernel) { phase == AttentionPhase::kKeys ? kernel.run(unit, scratch) : kernel.join(unit); });
}
AttentionBackwardSizes attention_backward_sizes(const AttentionBackwardParams& p) {
  AttentionBackwardSizes sizes{};
  if (AttentionFewBackward<float>::serves(p)) return AttentionFewBackward<float>(p).sizes();
  with_arithmetic(p.dtype, [&](auto a) { sizes = AttentionBackward<decltype(a)>(p).sizes(); });
  return sizes;
}
void attention_backward(const AttentionBackwardParams& p, AttentionBackwardPhase phase, int64_t unit, void* scratch) {
  if (AttentionFewBackward<float>::serves(p)) {
    with_storage(p.dtype, [&](auto number) { AttentionFewBackward<decltype(number)>(p).run(unit); });
  } else {
    with_arithmetic(p.dtype, [&](auto a) { AttentionBackward<decltype(a)>(p).run(phase, unit, scratch); });
  }
}

}  // namespace
}  // namespace fastgen
