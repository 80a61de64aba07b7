// How the work of single steps is split over the threads of the CPU.
#pragma once

#include <algorithm>
#include <optional>

#include "../cpu/kernel_table.h"
#include "memory.h"
#include "rows.h"

namespace fastgen {

// Where the arguments of cell_ops.h put results.
struct Cpu {
  static Tensor empty(const Tensor&, ScalarType dtype, const int64_t* sizes, int64_t dims) {
    Tensor out = empty_cpu(sizes, dims, dtype);
    prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
    return out;
  }
};

// Multiply-adds below which a second thread does not pay, for kernels that read their matrix from the cache.
constexpr int64_t kProductGrain = 1 << 17;

// Splits `units` units of `work` multiply-adds each over the threads.
template <class Body>
void for_units(int64_t units, int64_t work, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kProductGrain / std::max<int64_t>(1, work));
  if (units <= grain) return body(0, units);
  torch::stable::parallel_for(0, units, grain, body);
}

// A linear map of rows, split over the threads.
inline void run(const LinearRowsParams& p, const KernelTable& table) {
  for_units((p.outputs + kLinearOutputs - 1) / kLinearOutputs, p.batch * p.inputs * kLinearOutputs,
            [&](int64_t begin, int64_t end) { table.linear_rows(p, begin, end); });
}

// The backward passes of several, split over the threads.
inline void run_backward(const LinearRowsBackwardParams* maps, int count, const KernelTable& table) {
  int64_t units = 0, work = 0;
  for (int i = 0; i < count; ++i) {
    units += linear_backward_units(maps[i]);
    work += 2 * maps[i].batch * maps[i].inputs * maps[i].outputs;
  }
  for_units(units, work / std::max<int64_t>(1, units), [&](int64_t begin, int64_t end) {
    for (int i = 0; i < count; ++i) {
      const int64_t own = linear_backward_units(maps[i]);
      if (begin < own && end > 0) table.linear_rows_backward(maps[i], std::max<int64_t>(0, begin), std::min(end, own));
      begin -= own;
      end -= own;
    }
  });
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
