// The product of two matrices, over blocks that stay in cache; the tiles are those of product.inl.
//
// Each panel of columns of the right side is packed as deep as L2 holds it and used for many rows of the left side. An
// element of the result is a chain of multiply-adds for each kDepthBlock, added up in order: its bits do not depend on
// the split, and its error grows with the root of the number of blocks only.
#pragma once

#include "product.inl"

namespace fastgen {
namespace {

template <class T>
class MatrixProduct {
  using A = Multiply<T>;
  using F = typename Work<T>::F;
  static constexpr int kWidth = kLanes<T>, kColumns = kFlatVectors * kWidth;
  static constexpr int64_t kMostRows = 768, kLeastRows = 96;  // of a unit: packing is to cost little beside them
  static constexpr int64_t kDepth = 1024;                     // of a packed panel

 public:
  explicit MatrixProduct(const MatrixParams& params) : p(params) {}

  // Of threads that are to share the work.
  MatrixSizes sizes(int64_t threads) const {
    MatrixSizes out{};
    if (transposed()) {
      out.unit_rows = round_up<int64_t>((p.rows + threads - 1) / threads, kLeastRows);
      const int64_t parts = (p.rows + out.unit_rows - 1) / out.unit_rows;
      out.unit_columns = round_up<int64_t>((p.columns * parts + threads - 1) / threads, kColumns);
      out.units = parts * ((p.columns + out.unit_columns - 1) / out.unit_columns);
      out.scratch = Transposed::scratch_bytes(p.depth);
      return out;
    }
    const int64_t panels = panel_count();
    out.unit_rows = kMostRows;
    const auto count = [&] { return (p.rows + out.unit_rows - 1) / out.unit_rows * panels; };
    while (out.unit_rows > kLeastRows && count() < 4 * threads) out.unit_rows /= 2;
    out.units = count();
    const int64_t depth = p.depth < kDepth ? p.depth : kDepth;
    out.scratch = int64_t(sizeof(T)) * (depth * kColumns + out.unit_rows * kWidth);
    return out;
  }

  void run(const MatrixSizes& sizes, int64_t unit, void* scratch) const {
    if (transposed()) {
      const int64_t across = (p.columns + sizes.unit_columns - 1) / sizes.unit_columns;
      const int64_t row = unit / across * sizes.unit_rows, column = unit % across * sizes.unit_columns;
      return run_transposed(row, at_most(sizes.unit_rows, p.rows - row), column,
                            at_most(sizes.unit_columns, p.columns - column), scratch);
    }
    const int64_t panels = panel_count(), row = unit / panels * sizes.unit_rows;
    const int64_t rows = at_most(sizes.unit_rows, p.rows - row), full = p.columns / kColumns;
    T* panel = static_cast<T*>(scratch);
    T* tail = panel + at_most(p.depth, kDepth) * kColumns;
    if (unit % panels < full) {
      run_panel<kFlatVectors>(row, rows, unit % panels * kColumns, kColumns, panel, tail);
    } else {
      const int64_t first = full * kColumns + (unit % panels - full) * kWidth;
      run_panel<1>(row, rows, first, at_most(kWidth, p.columns - first), panel, tail);
    }
  }

 private:
  using Transposed = TransposedProduct<A>;
  // Rows of the right side that are `stride` elements apart.
  struct StridedRows {
    const T* data;
    int64_t stride;
    FASTGEN_MEMBER F operator()(int64_t k, int64_t j, int count) const { return take<F>(data + k * stride + j, count); }
  };

  bool transposed() const { return p.left_step != 1; }
  // Whole panels, and a vector each for what is left.
  int64_t panel_count() const { return p.columns / kColumns + (p.columns % kColumns + kWidth - 1) / kWidth; }
  const T* left() const { return static_cast<const T*>(p.left); }
  const T* right() const { return static_cast<const T*>(p.right); }
  T* out() const { return static_cast<T*>(p.out); }

  template <int kVectors>
  void run_panel(int64_t row, int64_t rows, int64_t first, int64_t columns, T* panel, T* tail) const {
    constexpr int64_t kWide = kVectors * kWidth;
    // Where the last vector is not whole, sums wait in `tail`.
    const bool whole = columns == kWide;
    T* to = whole ? out() + row * p.columns + first : tail;
    const int64_t stride = whole ? p.columns : kWidth;
    for (int64_t r = 0; r < rows && (p.bias != nullptr || p.depth == 0); ++r) {
      for (int64_t i = 0; i < columns; ++i) {
        to[r * stride + i] = p.bias == nullptr ? T(0) : static_cast<const T*>(p.bias)[first + i];
      }
    }
    for (int64_t k = 0; k < p.depth; k += kDepth) {
      const int64_t depth = at_most(kDepth, p.depth - k);
      pack<kVectors>(k, depth, first, columns, panel);
      for (int64_t d = 0; d < depth; d += kDepthBlock) {
        multiply_strided_panel<A, kVectors>(rows, {left() + row * p.left_row + k + d, p.left_row, 1}, panel + d * kWide,
                                            kWide, at_most(kDepthBlock, depth - d), T(1),
                                            k + d > 0 || p.bias != nullptr, to, stride);
      }
    }
    if (whole) return;
    for (int64_t r = 0; r < rows; ++r) {
      put(out() + (row + r) * p.columns + first, take<F>(tail + r * kWidth, int(columns)), int(columns));
    }
  }

  template <int kVectors>
  void pack(int64_t k, int64_t depth, int64_t first, int64_t columns, T* panel) const {
    if (p.right_column == 1) {
      return pack_panel<A, kVectors>(StridedRows{right() + first, p.right_row}, k, depth, 0, columns, panel);
    }
    for (int v = 0; v < kVectors; ++v) {
      const T* rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const int64_t j = v * kWidth + i;
        rows[i] = j < columns ? right() + (first + j) * p.right_column + k : nullptr;
      }
      A::pack(rows, depth, kVectors * kWidth, panel + v * kWidth);
    }
  }

  void run_transposed(int64_t row, int64_t rows, int64_t column, int64_t columns, void* scratch) const {
    const typename Transposed::template Target<StridedRows> target{
        {right() + column, p.right_row}, columns, out() + row * p.columns + column, p.columns};
    Transposed::run(left() + row, p.left_step, p.depth, rows, &target, 1, scratch);
    if (p.depth > 0) return;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) out()[(row + r) * p.columns + column + j] = T(0);
    }
  }

  const MatrixParams& p;
};

MatrixSizes matrix_sizes(const MatrixParams& p, int64_t threads) {
  return p.dtype == DType::kFloat64 ? MatrixProduct<double>(p).sizes(threads) : MatrixProduct<float>(p).sizes(threads);
}
void matrix_product(const MatrixParams& p, const MatrixSizes& sizes, int64_t unit, void* scratch) {
  if (p.dtype == DType::kFloat64) return MatrixProduct<double>(p).run(sizes, unit, scratch);
  MatrixProduct<float>(p).run(sizes, unit, scratch);
}

}  // namespace
}  // namespace fastgen
