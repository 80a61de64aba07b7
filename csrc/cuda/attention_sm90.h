// The forward pass of attention on devices of compute capability 9.0.
#pragma once

#include "../torch/attention_arguments.h"

namespace fastgen {

// Computes out and lse where the kernel takes the call, the device and this build; else nothing is done, and the answer
// is false.
bool attention_sm90(Arguments& arguments, const Tensor& query, const Tensor& out, const Tensor& lse);

}  // namespace fastgen
