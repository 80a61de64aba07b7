// Matrices as the kernels of cell.inl read them, rows of adjacent elements, and how their work is split.
#pragma once

#include <algorithm>

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

// One step of a layer, split over the threads.
inline void run(const CellParams& p, const KernelTable& table) {
  for_units((p.hidden_size + kCellUnits - 1) / kCellUnits,
            p.batch * gate_count(p.mode) * kCellUnits * (p.input_size + p.state_size),
            [&](int64_t begin, int64_t end) { table.recurrent_cell(p, begin, end); });
}

}  // namespace fastgen
