// Matrices as the kernels of cell.inl read them, rows of adjacent elements, and how their work is split.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../cpu/kernel_table.h"
#include "tensor.h"

namespace fastgen {

inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  ": expected a matrix of ", rows, " x ", columns);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_cpu(), name,
                  ": expected the dtype and device of the other operands");
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected a vector of ", size);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_cpu(), name,
                  ": expected the dtype and device of the other operands");
}

// The tensor itself where it is contiguous, else a copy; to ask the dispatcher would cost a microsecond.
inline Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself where its last dimension is dense, else a contiguous copy.
inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline RowsOperand rows_of(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), nullptr}; }

// Multiply-adds below which a second thread does not pay, for kernels that read their matrix from the cache.
constexpr int64_t kProductGrain = 1 << 17;

// Splits `units` units of `work` multiply-adds each over the threads.
template <class Body>
void for_units(int64_t units, int64_t work, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kProductGrain / std::max<int64_t>(1, work));
  if (units <= grain) return body(0, units);
  torch::stable::parallel_for(0, units, grain, body);
}

inline CellMode mode_of(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 3, "mode: expected 0 (LSTM), 1 (GRU), 2 (RNN tanh) or 3 (RNN relu), got ", mode);
  return CellMode(mode);
}

// Operands of layer norm, the copies that their strides asked for, and checks.
class NormOperands {
 public:
  using Optional = std::optional<Tensor>;

  NormOperands(CellOptions& p, CellMode mode, int64_t hidden, ScalarType dtype, const Optional& ih, const Optional& hh,
               const Optional& c, const Optional& c_bias) {
    const bool norm = ih.has_value();
    STD_TORCH_CHECK(norm == hh.has_value() && norm == c.has_value() && norm == c_bias.has_value() &&
                        (mode == CellMode::kLstm || !norm),
                    "norm_ih, norm_hh, norm_c, norm_c_bias: expected all or none, and none but for an LSTM");
    set(p.norm_ih, "norm_ih", ih, 4 * hidden, dtype);
    set(p.norm_hh, "norm_hh", hh, 4 * hidden, dtype);
    set(p.norm_c, "norm_c", c, hidden, dtype);
    set(p.norm_c_bias, "norm_c_bias", c_bias, hidden, dtype);
  }

 private:
  void set(const void*& to, const char* name, const Optional& tensor, int64_t size, ScalarType dtype) {
    if (!tensor) return;
    check_vector(name, *tensor, size, dtype);
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

// The memory for `sums` of a cell of up to `batch` rows that needs whole ones.
inline std::optional<Tensor> sums_for(CellParams& p, int64_t batch) {
  if (!by_rows(p)) return std::nullopt;
  const int64_t count = batch * cell_row_size(p);
  const Tensor sums = empty_cpu(&count, 1, p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  p.sums = sums.mutable_data_ptr();
  return sums;
}

// One step of a layer, split over the threads.
inline void run(const CellParams& p, const KernelTable& table) {
  for_units((p.hidden_size + kCellUnits - 1) / kCellUnits,
            p.batch * gate_count(p.mode) * kCellUnits * (p.input_size + p.state_size),
            [&](int64_t begin, int64_t end) { table.recurrent_cell(p, begin, end); });
  if (!by_rows(p)) return;
  // An activation is worth some 16 multiply-adds.
  for_units(p.batch, 16 * gate_count(p.mode) * p.hidden_size,
            [&](int64_t begin, int64_t end) { table.recurrent_cell_rows(p, begin, end); });
}

}  // namespace fastgen
