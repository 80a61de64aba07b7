// Matrices as single steps read them on any device, rows of adjacent elements: checks and parameters.
#pragma once

#include <optional>
#include <vector>

#include "tensor.h"

namespace fastgen {

// What the operands of an op have in common.
class Kind {
 public:
  explicit Kind(const Tensor& tensor)
      : dtype(tensor.scalar_type()), cpu_(tensor.is_cpu()), device_(cpu_ ? 0 : tensor.get_device_index()) {
    check_floating(dtype);
  }
  void check(const char* name, const Tensor& tensor) const {
    const bool fits = tensor.scalar_type() == dtype && tensor.is_cpu() == cpu_;
    STD_TORCH_CHECK(fits && (cpu_ || tensor.get_device_index() == device_), name,
                    ": expected the dtype and device of the other operands");
  }

  const ScalarType dtype;

 private:
  const bool cpu_;
  const int64_t device_;
};

inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const Kind& kind) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  ": expected a matrix of ", rows, " x ", columns);
  kind.check(name, tensor);
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t size, const Kind& kind) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected a vector of ", size);
  kind.check(name, tensor);
}

// The tensor itself where its last dimension is dense, else a contiguous copy.
inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline RowsOperand rows_of(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), nullptr}; }

inline CellMode mode_of(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 3, "mode: expected 0 (LSTM), 1 (GRU), 2 (RNN tanh) or 3 (RNN relu), got ", mode);
  return CellMode(mode);
}

// Operands of layer norm, the copies that their strides asked for, and checks.
class NormOperands {
 public:
  using Optional = std::optional<Tensor>;

  NormOperands(CellOptions& p, CellMode mode, int64_t hidden, const Kind& kind, const Optional& ih, const Optional& hh,
               const Optional& c, const Optional& c_bias) {
    const bool norm = ih.has_value();
    STD_TORCH_CHECK(norm == hh.has_value() && norm == c.has_value() && norm == c_bias.has_value() &&
                        (mode == CellMode::kLstm || !norm),
                    "norm_ih, norm_hh, norm_c, norm_c_bias: expected all or none, and none but for an LSTM");
    set(p.norm_ih, "norm_ih", ih, 4 * hidden, kind);
    set(p.norm_hh, "norm_hh", hh, 4 * hidden, kind);
    set(p.norm_c, "norm_c", c, hidden, kind);
    set(p.norm_c_bias, "norm_c_bias", c_bias, hidden, kind);
  }

 private:
  void set(const void*& to, const char* name, const Optional& tensor, int64_t size, const Kind& kind) {
    if (!tensor) return;
    check_vector(name, *tensor, size, kind);
    kept_.push_back(dense_rows(*tensor));
    to = kept_.back().const_data_ptr();
  }

  std::vector<Tensor> kept_;
};

// Zoneout of a step as its expectation.
inline void set_zoneout(CellOptions& p, CellMode mode, double zoneout_c, double zoneout_h) {
  STD_TORCH_CHECK(zoneout_c >= 0 && zoneout_c <= 1 && zoneout_h >= 0 && zoneout_h <= 1 &&
                      (mode == CellMode::kLstm || zoneout_c == 0),
                  "zoneout_c, zoneout_h: expected probabilities, and 0 for c where there is none, got ", zoneout_c,
                  " and ", zoneout_h);
  p.zoneout_c = zoneout_c;
  p.zoneout_h = zoneout_h;
}

}  // namespace fastgen
