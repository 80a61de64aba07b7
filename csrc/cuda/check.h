// Launching on torch's stream, through the stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../torch/tensor.h"

#define FASTGEN_CUDA_CHECK(call)                                                                 \
  do {                                                                                           \
    const cudaError_t status = (call);                                                           \
    STD_TORCH_CHECK(status == cudaSuccess, "fastgen: CUDA error: ", cudaGetErrorString(status)); \
  } while (false)

namespace fastgen {

// Makes the tensor's device current for torch and for the statically linked runtime, which keeps its own
// idea of it on each thread.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    FASTGEN_CUDA_CHECK(cudaSetDevice(tensor.get_device_index()));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream that torch is using on the tensor's device: never the default one, or CUDA graphs and users
// of several streams would see results too early.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The seed stays on the device: nothing waits for it, and a captured graph reads it anew at each replay.
inline const int64_t* seed_offset_pointer(const std::optional<Tensor>& seed_offset, Tensor& keep) {
  if (!seed_offset) return nullptr;
  check_seed_offset(*seed_offset, 2);
  keep = torch::stable::contiguous(*seed_offset);
  return static_cast<const int64_t*>(keep.const_data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastgen
