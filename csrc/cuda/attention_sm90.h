// Attention on devices of compute capability 9.0.
#pragma once

#include "../torch/attention_arguments.h"
#include "check.h"
#include "device.h"

namespace fastgen {

struct GradientOperands;

// Each computes what it is named after, where its kernel takes the call, the device and this build; else nothing is
// done, and the answer is false.
bool attention_sm90(Arguments& arguments, const Tensor& query, const Tensor& out, const Tensor& lse);
bool attention_backward_sm90(Arguments& arguments, const GradientOperands& operands, const Tensor& query);

constexpr int64_t kCachedSm90 = 16 << 20;  // bytes that units which are dealt out together read, a third of the cache

// Whether every row starts a whole number of aligned pieces of 16 bytes from the first one.
inline bool has_vectors(const Tensor4& x, int64_t width) {
  const bool whole = x.stride[0] % 8 == 0 && x.stride[1] % 8 == 0 && x.stride[2] % 8 == 0 && width % 8 == 0;
  return whole && x.stride[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// What both take of a call, but for how much there is to do.
inline bool takes_sm90(const AttentionParams& p) {
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const bool plain = p.softcap == 0 && p.mask.data == nullptr && p.slopes == nullptr && p.keep == uint64_t(1) << 32;
  return compute_capability() == 90 && half && plain && float(p.scale) > 0 && has_vectors(p.query, p.width) &&
         has_vectors(p.key, p.width) && has_vectors(p.value, p.value_width);
}

}  // namespace fastgen
