// The linear map of few rows and its backward pass, where reading the weight and writing its gradient is the bound:
// from where everything lies, nothing is packed. Written once over Isa.
//
//   y = x W^T + b    dx = dy W + direct part    dW = dy^T x    db = sum of the rows of dy
#pragma once

#include <type_traits>

#include "dot.inl"
#include "product.inl"

namespace fastgen {
namespace {

template <class Storage>
void linear_rows_as(const LinearRowsParams& p, int64_t begin, int64_t end) {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  const Term<Storage> terms[] = {{rows_of<Storage>(p.w), rows_of<Storage>(p.x), p.inputs}};
  alignas(64) T sums[kDotRows][kLinearOutputs];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLinearOutputs;
    const int64_t outputs = p.outputs - first < kLinearOutputs ? p.outputs - first : kLinearOutputs;
    for (int64_t row = 0; row < p.batch; row += kDotRows) {
      const int64_t rows = p.batch - row < kDotRows ? p.batch - row : kDotRows;
      dot_tile(terms, row, rows, first, outputs, sums[0], kLinearOutputs);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < outputs; i += kLanes<T>) {
          const int count = outputs - i < kLanes<T> ? int(outputs - i) : kLanes<T>;
          F y;
          load(&sums[r][i], y);
          if (p.bias != nullptr) y = y + take<F>(static_cast<const Storage*>(p.bias) + first + i, count);
          put(static_cast<Storage*>(p.y) + (row + r) * p.outputs + first + i, y, count);
        }
      }
    }
  }
}

template <class Storage>
struct LinearRowsBackward {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  static constexpr int kWidth = kLanes<T>;
  // Of a product over the rows of the batch, as many sums as registers hold beside their operands.
  static constexpr int kOuterRows = 4, kOuterVectors = Isa::kSums / 6;

  const LinearRowsBackwardParams& p;

  FASTGEN_MEMBER const T* grad(int64_t row, int64_t output) const {
    return static_cast<const T*>(p.grad_y) + row * p.outputs + output;
  }

  FASTGEN_MEMBER void run(int64_t begin, int64_t end) const {
    const int64_t panels = linear_panels(p);
    for (int64_t unit = begin; unit < end; ++unit) {
      if (unit < panels) {
        to_x(unit * kLinearColumns);
      } else {
        const int64_t first = (unit - panels) * kLinearOutputs;
        const int64_t last = p.outputs - first < kLinearOutputs ? p.outputs : first + kLinearOutputs;
        if (p.grad_w != nullptr) to_w(first, last);
        if (p.grad_bias != nullptr) to_bias(first, last);
      }
    }
  }

  // Columns [first, first + kLinearColumns) of dy W: for each kDepthBlock rows of W, which stay in cache meanwhile, all
  // rows of the batch; a chain of multiply-adds for each block, added up in order.
  __attribute__((noinline)) void to_x(int64_t first) const {
    constexpr int64_t kGroup = 64;
    alignas(64) T totals[kGroup * kLinearColumns];
    const int64_t columns = p.inputs - first < kLinearColumns ? p.inputs - first : kLinearColumns;
    for (int64_t row = 0; row < p.batch; row += kGroup) {
      const int64_t rows = p.batch - row < kGroup ? p.batch - row : kGroup;
      for (int64_t i = 0; i < rows * kLinearColumns; i += kWidth) store(totals + i, F(T(0)));
      for (int64_t j = 0; j < p.outputs; j += kDepthBlock) {
        const int64_t depth = p.outputs - j < kDepthBlock ? p.outputs - j : kDepthBlock;
        for (int64_t r = 0; r < rows; r += kDotRows) {
          with_rows<kDotRows>(rows - r, [&](auto count) {
            add_block<decltype(count)::value>(row + r, j, depth, first, columns, totals + r * kLinearColumns);
          });
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < columns; i += kWidth) {
          const int count = columns - i < kWidth ? int(columns - i) : kWidth;
          const int64_t at = (row + r) * p.inputs + first + i;
          F total;
          load(totals + r * kLinearColumns + i, total);
          if (p.direct != nullptr) total = total + take<F>(static_cast<const T*>(p.direct) + at, count);
          put(static_cast<Storage*>(p.grad_x) + at, total, count);
        }
      }
    }
  }

  // Adds to kRows rows of totals what `depth` rows of W, from j on, give.
  template <int kRows>
  FASTGEN_MEMBER void add_block(int64_t row, int64_t j, int64_t depth, int64_t first, int64_t columns,
                                T* totals) const {
    constexpr int kVectors = kDotOutputs<kRows>;
    int64_t i = 0;
    for (; i + kVectors * kWidth <= columns; i += kVectors * kWidth) {
      add_panel<kRows, kVectors>(row, j, depth, first + i, kWidth, totals + i);
    }
    for (; i < columns; i += kWidth) {
      const int count = columns - i < kWidth ? int(columns - i) : kWidth;
      add_panel<kRows, 1>(row, j, depth, first + i, count, totals + i);
    }
  }

  // The same of kVectors vectors of columns, the last of which has `count`.
  template <int kRows, int kVectors>
  __attribute__((noinline)) void add_panel(int64_t row, int64_t j, int64_t depth, int64_t column, int count,
                                           T* totals) const {
    const Rows<Storage> w = rows_of<Storage>(p.w);
    F sums[kRows][kVectors];
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = F(T(0));
    }
    for (int64_t d = 0; d < depth; ++d) {
      F g[kRows];
      FASTGEN_UNROLL
      for (int r = 0; r < kRows; ++r) g[r] = F(*grad(row + r, j + d));
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const F x = take<F>(w[j + d] + column + v * kWidth, count);
        FASTGEN_UNROLL
        for (int r = 0; r < kRows; ++r) sums[r][v] = multiply_add(g[r], x, sums[r][v]);
      }
    }
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        T* to = totals + r * kLinearColumns + v * kWidth;
        F total;
        load(to, total);
        store(to, total + sums[r][v]);
      }
    }
  }

  // Rows [begin, end) of dy^T x.
  __attribute__((noinline)) void to_w(int64_t begin, int64_t end) const {
    int64_t j = begin;
    for (; j + kOuterRows <= end; j += kOuterRows) outer_rows<kOuterRows>(j);
    for (; j < end; ++j) outer_rows<1>(j);
  }
  template <int kRows>
  FASTGEN_MEMBER void outer_rows(int64_t j) const {
    int64_t k = 0;
    for (; k + kOuterVectors * kWidth <= p.inputs; k += kOuterVectors * kWidth) {
      outer<kRows, kOuterVectors>(j, k, kWidth);
    }
    for (; k < p.inputs; k += kWidth) outer<kRows, 1>(j, k, p.inputs - k < kWidth ? int(p.inputs - k) : kWidth);
  }

  // kRows rows from j on by kVectors vectors from k on, the last of which has `count` columns.
  template <int kRows, int kVectors>
  FASTGEN_MEMBER void outer(int64_t j, int64_t k, int count) const {
    const Rows<Storage> rows = rows_of<Storage>(p.x);
    F sums[kRows][kVectors];
    FASTGEN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[i][v] = F(T(0));
    }
    for (int64_t b = 0; b < p.batch; ++b) {
      F x[kVectors];
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) x[v] = take<F>(rows[b] + k + v * kWidth, count);
      FASTGEN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const F g(*grad(b, j + i));
        FASTGEN_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(g, x[v], sums[i][v]);
      }
    }
    FASTGEN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        put(static_cast<Storage*>(p.grad_w) + (j + i) * p.inputs + k + v * kWidth, sums[i][v], count);
      }
    }
  }

  FASTGEN_MEMBER void to_bias(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; j += kWidth) {
      const int count = end - j < kWidth ? int(end - j) : kWidth;
      F sum(T(0));
      for (int64_t b = 0; b < p.batch; ++b) sum = sum + take<F>(grad(b, j), count);
      put(static_cast<Storage*>(p.grad_bias) + j, sum, count);
    }
  }

  // body with the number of rows as a constant; kMost where there are more.
  template <int kMost, class Body>
  FASTGEN_MEMBER static void with_rows(int64_t rows, const Body& body) {
    if constexpr (kMost > 1) {
      if (rows < kMost) return with_rows<kMost - 1>(rows, body);
    }
    body(std::integral_constant<int, kMost>());
  }
};

template <class Storage>
void linear_rows_backward_as(const LinearRowsBackwardParams& p, int64_t begin, int64_t end) {
  LinearRowsBackward<Storage>{p}.run(begin, end);
}

void linear_rows(const LinearRowsParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto storage) { linear_rows_as<decltype(storage)>(p, begin, end); });
}
void linear_rows_backward(const LinearRowsBackwardParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto storage) { linear_rows_backward_as<decltype(storage)>(p, begin, end); });
}

}  // namespace
}  // namespace fastgen
