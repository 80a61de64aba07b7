// The activation kernels of an instruction set, by the dtype of a call.
#pragma once

#include "activation.inl"

namespace fastgen {
namespace {

void activation(const ActivationParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto number) { ActivationRows<decltype(number)>(p).forward(begin, end); });
}
void activation_backward(const ActivationBackwardParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto number) { ActivationRows<decltype(number)>(p).backward(p, begin, end); });
}
void activation_add_blocks(const ActivationBackwardParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto number) { ActivationRows<decltype(number)>(p).add_blocks(p, begin, end); });
}

}  // namespace
}  // namespace fastgen
