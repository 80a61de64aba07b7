// From torch's tensors to the plain structs of csrc/common/params.h. Stable-ABI headers only: one binary
// serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "../common/params.h"

namespace fastgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Bool: return DType::kBool;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    default: STD_TORCH_CHECK(false, "fastgen: no kernel for dtype number ", int(type));
  }
}

// A kernel writes elements of the size of its own dtypes: any other must stop before it.
inline void check_floating(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "dtype: expected float32, float64, bfloat16 or float16, got dtype number ", int(type));
}

inline void check_seed_offset(const Tensor& seed_offset, int64_t max_dims) {
  STD_TORCH_CHECK(seed_offset.scalar_type() == ScalarType::Long && seed_offset.dim() >= 1 &&
                      seed_offset.dim() <= max_dims && seed_offset.size(seed_offset.dim() - 1) == 2,
                  "seed_offset: expected an int64 tensor whose last dimension is 2, got ", seed_offset.dim(),
                  " dimensions");
}

// An uninitialised contiguous CPU tensor, by the shortest way: the general factories cost 0.6 us more.
inline Tensor empty_cpu(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  constexpr int64_t kStackDims = 64;  // as many as torch's own elementwise ops take
  STD_TORCH_CHECK(dims <= kStackDims, "fastgen: expected at most ", kStackDims, " dimensions, got ", dims);
  int64_t strides[kStackDims];
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, int32_t(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The tensor itself where it is contiguous, else a copy; to ask the dispatcher would cost a microsecond.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (x.size() != y.size()) return false;
  for (size_t d = 0; d < x.size(); ++d) {
    if (x[d] != y[d]) return false;
  }
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& mu) {
  STD_TORCH_CHECK(same_sizes(tensor, mu) && tensor.scalar_type() == mu.scalar_type() && same_device(tensor, mu), name,
                  ": expected the shape, dtype and device of the other operands");
}

// Seed and offset on the host; a stream of which nothing is drawn may be absent.
inline void read_seed_offset(const std::optional<Tensor>& seed_offset, uint64_t& seed, uint64_t& offset) {
  seed = offset = 0;
  if (!seed_offset) return;
  const int64_t* words = static_cast<const int64_t*>(seed_offset->const_data_ptr());
  seed = uint64_t(words[0]);
  offset = uint64_t(words[seed_offset->stride(0)]);
}

// The operands of an elementwise op with as few dimensions as their strides allow.
class ElementwiseLayout {
 public:
  // keep_last: rows are rows of the tensor, for sums over its last dimension. Otherwise rows may merge.
  ElementwiseLayout(const Tensor& like, bool keep_last) : like_(like), keep_last_(keep_last) {}

  // Adds a tensor of the same shape (or of that shape without the last dimension: constant along it).
  void add(const std::optional<Tensor>& tensor, Operand& operand, bool per_row = false) {
    operand = {};
    if (!tensor) return;
    operand.data = tensor->const_data_ptr();
    entries_[count_++] = {&operand, *tensor, per_row};
  }

  // Fills in the shape and the operands' strides.
  void finish(Shape& shape) {
    if (coalesce(shape)) return;
    for (int i = 0; i < count_; ++i) {  // more irregular dimensions than kMaxDims: copy
      entries_[i].tensor = torch::stable::contiguous(entries_[i].tensor);
      entries_[i].operand->data = entries_[i].tensor.const_data_ptr();
    }
    STD_TORCH_CHECK(coalesce(shape), "fastgen: too many dimensions");
  }

 private:
  struct Entry {
    Operand* operand;
    Tensor tensor;
    bool per_row;
  };
  static constexpr int kMaxOperands = 5;

  int64_t stride(int i, int64_t d) const {
    return entries_[i].per_row && d == like_.dim() - 1 ? 0 : entries_[i].tensor.stride(d);
  }

  bool coalesce(Shape& shape) {
    const auto sizes = like_.sizes();
    // Merged dimensions, innermost first.
    int64_t extent[kMaxDims + 1], step[kMaxOperands][kMaxDims + 1];
    int dims = 0;
    for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
      const bool is_last = d == int64_t(sizes.size()) - 1;
      if (sizes[d] == 1 && !(is_last && keep_last_)) continue;
      bool merges = dims > 0 && !(keep_last_ && dims == 1);
      for (int i = 0; merges && i < count_; ++i) merges = stride(i, d) == step[i][dims - 1] * extent[dims - 1];
      if (merges) {
        extent[dims - 1] *= sizes[d];
        continue;
      }
      if (dims == kMaxDims + 1) return false;
      extent[dims] = sizes[d];
      for (int i = 0; i < count_; ++i) step[i][dims] = stride(i, d);
      ++dims;
    }
    shape.inner = dims > 0 ? extent[0] : 1;
    shape.outer_dims = dims > 0 ? dims - 1 : 0;
    shape.rows = 1;
    for (int k = 0; k < shape.outer_dims; ++k) {
      shape.outer[k] = extent[dims - 1 - k];
      shape.rows *= shape.outer[k];
    }
    for (int i = 0; i < count_; ++i) {
      Operand& operand = *entries_[i].operand;
      operand.inner_stride = dims > 0 ? step[i][0] : 0;
      for (int k = 0; k < shape.outer_dims; ++k) operand.outer_stride[k] = step[i][dims - 1 - k];
    }
    return true;
  }

  const Tensor& like_;
  const bool keep_last_;
  Entry entries_[kMaxOperands];
  int count_ = 0;
};

}  // namespace fastgen
