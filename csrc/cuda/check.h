// What the ops of CUDA tensors share: torch's stream, its errors, and the way back to the reference.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "../torch/tensor.h"

// An error that is thrown is also taken from the runtime, or the next launch would report it once more.
#define FASTGEN_CUDA_CHECK(call)                                                                 \
  do {                                                                                           \
    const cudaError_t status = (call);                                                           \
    if (status != cudaSuccess) cudaGetLastError();                                               \
    STD_TORCH_CHECK(status == cudaSuccess, "fastgen: CUDA error: ", cudaGetErrorString(status)); \
  } while (false)

// FASTGEN_CUDA_OPS(m) { m.impl("name", TORCH_BOX(&function)); }
#if defined(FASTGEN_EMULATED)
#define FASTGEN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(fastgen_emulated, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define FASTGEN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m)
#endif

namespace fastgen {

#if defined(FASTGEN_EMULATED)
// The emulated device has the memory of the CPU and one stream.
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
inline bool is_captured(cudaStream_t) { return false; }

// It comes late: the host has gone on.
class Answer {
 public:
  void ask(Tensor number) {
    number_ = *static_cast<const int32_t*>(number.const_data_ptr());
    looks_ = 0;
  }
  std::optional<int32_t> look() { return ++looks_ > 3 ? std::optional(number_) : std::nullopt; }

 private:
  int32_t number_;
  int looks_;
};
#else
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
inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

// Whether what is launched there becomes a CUDA graph, and does not run now.
inline bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  FASTGEN_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  return capture != cudaStreamCaptureStatusNone;
}

// A number, not negative, on its way from the device, that the host does not wait for. It says by itself that it has
// come: until then -1 stands in its place, pinned memory that torch keeps until the copy has been made.
class Answer {
 public:
  // number: (1,) int32.
  void ask(const Tensor& number) {
    const int64_t one = 1;
    Tensor place = torch::stable::empty({&one, 1}, ScalarType::Int, std::nullopt, std::nullopt, true);
    *static_cast<volatile int32_t*>(place.mutable_data_ptr()) = -1;
    torch::stable::copy_(place, number, true);
    place_ = place;
  }
  std::optional<int32_t> look() const {
    const int32_t number = *static_cast<const volatile int32_t*>(place_->const_data_ptr());
    return number < 0 ? std::nullopt : std::optional(number);
  }

 private:
  std::optional<Tensor> place_;
};
#endif

// The seed stays on the device: nothing waits for it, and a captured graph reads it anew at each replay.
inline const int64_t* seed_offset_pointer(const std::optional<Tensor>& seed_offset, Tensor& keep) {
  if (!seed_offset) return nullptr;
  check_seed_offset(*seed_offset, 2);
  keep = torch::stable::contiguous(*seed_offset);
  return static_cast<const int64_t*>(keep.const_data_ptr());
}

namespace detail {

template <class Results>
struct FromStack {
  static Results take(StableIValue* stack) { return torch::stable::detail::to<Results>(stack[0]); }
};
template <class... Results>
struct FromStack<std::tuple<Results...>> {
  static std::tuple<Results...> take(StableIValue* stack) {
    return take(stack, std::make_index_sequence<sizeof...(Results)>());
  }
  template <size_t... kIndex>
  static std::tuple<Results...> take(StableIValue* stack, std::index_sequence<kIndex...>) {
    return {torch::stable::detail::to<Results>(stack[kIndex])...};
  }
};

}  // namespace detail

// Any op of torch's dispatcher; Results is its result, or a tuple of them.
template <class Results, class... Args>
Results call_op(const char* name, const char* overload, const Args&... args) {
  constexpr size_t kMostResults = 16;
  std::array<StableIValue, std::max(sizeof...(Args), kMostResults)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return detail::FromStack<Results>::take(stack.data());
}

// What fastgen.reference answers to the arguments of an op, for those that its kernel does not take.
template <class Results, class... Args>
Results plain(const char* name, const Args&... args) {
  return call_op<Results>(name, "plain", args...);
}

// out = left right, by the variant of torch's product that writes to a given tensor: autocast leaves it alone. Operands
// that want a gradient come by way of `detached`.
inline void multiply_into(const Tensor& out, const Tensor& left, const Tensor& right) {
  call_op<Tensor>("aten::mm", "out", left, right, out);
}
inline Tensor detached(const Tensor& tensor) { return call_op<Tensor>("aten::detach", "", tensor); }
inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }
// out = the sum of the rows of a matrix.
inline void sum_rows_into(Tensor& out, const Tensor& rows) {
  const int64_t first = 0;
  torch::stable::sum_out(out, rows, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1), false, rows.scalar_type());
}

// Where the arguments of cell_ops.h put results.
struct Cuda {
  static Tensor empty(const Tensor& like, ScalarType dtype, const int64_t* sizes, int64_t dims) {
    return torch::stable::new_empty(like, {sizes, size_t(dims)}, dtype);
  }
};

inline void* data_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastgen
