// Small arrays of the host in device memory, without a copy that would wait or that a CUDA graph could not capture:
// they travel as parameters of a kernel.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"
#include "device.h"

namespace fastgen {
namespace {

constexpr int kUploaded = 448;  // numbers a launch takes: 3.5 of the 4 KB that parameters may have

struct Uploaded {
  int64_t number[kUploaded];
};

__global__ void upload_kernel(int64_t* to, Uploaded from, int count) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) to[i] = from.number[i];
}

// An int64 tensor (numbers) on the device of `like`.
inline Tensor upload(const std::vector<int64_t>& numbers, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {int64_t(numbers.size())}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(out.mutable_data_ptr());
  for (size_t first = 0; first < numbers.size(); first += kUploaded) {
    const size_t count = std::min(numbers.size() - first, size_t(kUploaded));
    Uploaded block{};
    std::copy_n(numbers.data() + first, count, block.number);
    launch(upload_kernel, dim3(1), dim3(128), 0, current_stream(like), to + first, block, int(count));
  }
  return out;
}

}  // namespace
}  // namespace fastgen
