// The backward pass of one step: the gradients of the sums before the gates, and for few rows, where reading the
// weights and writing their gradients is the bound, the products with them from where everything lies. Written once
// over Isa.
//
//   dx = dG_ih W_ih    dh = dG_hh W_hh + direct part    dW_ih = dG_ih^T x    dW_hh = dG_hh^T h    db = sum over rows
#pragma once

#include <type_traits>

#include "../common/activations.h"
#include "dot.inl"
#include "product.inl"

namespace fastgen {
namespace {

template <class Storage, CellMode kMode>
struct CellBackward {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kGates = kMode == CellMode::kLstm ? 4 : kMode == CellMode::kGru ? 3 : 1;

  // Of a product over the rows of the batch, as many sums as registers hold beside their operands.
  static constexpr int kOuterRows = 4, kOuterVectors = Isa::kSums / 6;

  const CellBackwardParams& p;

  FASTGEN_MEMBER int64_t gate_rows() const { return kGates * p.hidden_size; }

  FASTGEN_MEMBER void rows(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t unit = 0; unit < p.hidden_size; unit += kWidth) {
        const int count = p.hidden_size - unit < kWidth ? int(p.hidden_size - unit) : kWidth;
        one(row, unit, count);
      }
    }
  }

  FASTGEN_MEMBER F at(const void* data, int64_t i, int count) const {
    return data == nullptr ? F(T(0)) : take<F>(static_cast<const Storage*>(data) + i, count);
  }
  FASTGEN_MEMBER void to_gate(void* data, int64_t row, int gate, int64_t unit, int count, F value) const {
    put(static_cast<T*>(data) + row * gate_rows() + gate * p.hidden_size + unit, value, count);
  }

  FASTGEN_MEMBER void one(int64_t row, int64_t unit, int count) const {
    const F unity(T(1));
    const int64_t i = row * p.hidden_size + unit;
    const F dh = at(p.grad_h_1, i, count);
    if constexpr (kMode == CellMode::kLstm || kMode == CellMode::kGru) {
      F gate[4];
      for (int g = 0; g < 4; ++g) gate[g] = at(p.gates, (4 * row + g) * p.hidden_size + unit, count);
      if constexpr (kMode == CellMode::kLstm) {
        const auto [in, forget, cell, out] = gate;
        const F t = hyperbolic_tangent<T, U>(take<F>(static_cast<const T*>(p.cells) + i, count));
        const F dc = at(p.grad_c_1, i, count) + dh * out * (unity - t * t);
        to_gate(p.to_gates_ih, row, 0, unit, count, dc * cell * in * (unity - in));
        to_gate(p.to_gates_ih, row, 1, unit, count, dc * at(p.c, i, count) * forget * (unity - forget));
        to_gate(p.to_gates_ih, row, 2, unit, count, dc * in * (unity - cell * cell));
        to_gate(p.to_gates_ih, row, 3, unit, count, dh * t * out * (unity - out));
        if (p.grad_c != nullptr) put(static_cast<Storage*>(p.grad_c) + i, dc * forget, count);
      } else {
        const auto [reset, update, candidate, from_state] = gate;
        const F h = take<F>(rows_of<Storage>(p.h)[row] + unit, count);
        const F dn = dh * (unity - update) * (unity - candidate * candidate);
        const F dr = dn * from_state * reset * (unity - reset);
        const F dz = dh * (h - candidate) * update * (unity - update);
        void* const sides[] = {p.to_gates_ih, p.to_gates_hh};
        for (void* to : sides) {
          to_gate(to, row, 0, unit, count, dr);
          to_gate(to, row, 1, unit, count, dz);
        }
        to_gate(p.to_gates_ih, row, 2, unit, count, dn);
        to_gate(p.to_gates_hh, row, 2, unit, count, dn * reset);
      }
    } else {
      const F h_1 = at(p.gates, i, count);
      if constexpr (kMode == CellMode::kTanh) {
        to_gate(p.to_gates_ih, row, 0, unit, count, dh * (unity - h_1 * h_1));
      } else {
        to_gate(p.to_gates_ih, row, 0, unit, count, select(less(F(T(0)), h_1), dh, F(T(0))));
      }
    }
  }

  FASTGEN_MEMBER void products(int64_t begin, int64_t end) const {
    const int64_t of_input = cell_panels(p.grad_input, p.input_size);
    const int64_t of_state = cell_panels(p.grad_h, p.hidden_size);
    for (int64_t unit = begin; unit < end; ++unit) {
      if (unit < of_input) {
        to_operand(p.to_gates_ih, p.w_ih, p.grad_input, p.input_size, unit * kCellColumns, false);
      } else if (unit < of_input + of_state) {
        to_operand(p.to_gates_hh, p.w_hh, p.grad_h, p.hidden_size, (unit - of_input) * kCellColumns,
                   kMode == CellMode::kGru);
      } else {
        to_weights((unit - of_input - of_state) * kCellUnits);
      }
    }
  }

  // Columns [first, first + kCellColumns) of dG W, for all rows of the batch.
  FASTGEN_MEMBER void to_operand(const void* to_gates, const RowsOperand& weight, void* grad, int64_t columns,
                                 int64_t first, bool direct) const {
    const int64_t end = columns - first < kCellColumns ? columns : first + kCellColumns;
    for (int64_t row = 0; row < p.batch; row += kDotRows) {
      const auto run = [&](auto rows) {
        constexpr int kRows = decltype(rows)::value, kVectors = kDotOutputs<kRows>;
        int64_t column = first;
        for (; column + kVectors * kWidth <= end; column += kVectors * kWidth) {
          panel<kRows, kVectors>(to_gates, weight, grad, columns, row, column, kWidth, direct);
        }
        for (; column < end; column += kWidth) {
          const int count = end - column < kWidth ? int(end - column) : kWidth;
          panel<kRows, 1>(to_gates, weight, grad, columns, row, column, count, direct);
        }
      };
      with_rows<kDotRows>(p.batch - row, run);
    }
  }

  // kRows rows by kVectors vectors of dG W, the last of which has `count` columns: a chain of multiply-adds for each
  // kDepthBlock rows of W, added up in order.
  template <int kRows, int kVectors>
  __attribute__((noinline)) void panel(const void* to_gates, const RowsOperand& weight, void* grad, int64_t columns,
                                       int64_t row, int64_t column, int count, bool direct) const {
    const Rows<Storage> w = rows_of<Storage>(weight);
    const T* gates = static_cast<const T*>(to_gates) + row * gate_rows();
    alignas(64) T totals[kRows][kVectors * kWidth] = {};
    for (int64_t begin = 0; begin < gate_rows(); begin += kDepthBlock) {
      const int64_t end = gate_rows() - begin < kDepthBlock ? gate_rows() : begin + kDepthBlock;
      F sums[kRows][kVectors];
      FASTGEN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FASTGEN_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[r][v] = F(T(0));
      }
      for (int64_t j = begin; j < end; ++j) {
        const Storage* from = w[j] + column;
        F g[kRows];
        FASTGEN_UNROLL
        for (int r = 0; r < kRows; ++r) g[r] = F(gates[r * gate_rows() + j]);
        FASTGEN_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          F x;
          if constexpr (kVectors == 1) {
            x = take<F>(from, count);
          } else {
            load(from + v * kWidth, x);
          }
          FASTGEN_UNROLL
          for (int r = 0; r < kRows; ++r) sums[r][v] = multiply_add(g[r], x, sums[r][v]);
        }
      }
      FASTGEN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FASTGEN_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          F total;
          load(&totals[r][v * kWidth], total);
          store(&totals[r][v * kWidth], total + sums[r][v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t b = row + r, unit = column + v * kWidth;
        F total;
        load(&totals[r][v * kWidth], total);
        if (direct) {  // of a GRU: z h
          const F update = at(p.gates, (4 * b + 1) * p.hidden_size + unit, count);
          total = multiply_add(at(p.grad_h_1, b * p.hidden_size + unit, count), update, total);
        }
        put(static_cast<Storage*>(grad) + b * columns + unit, total, count);
      }
    }
  }

  // Rows [first, first + kCellUnits) of dG^T x, dG^T h and of the sums of dG.
  FASTGEN_MEMBER void to_weights(int64_t first) const {
    const int64_t end = gate_rows() - first < kCellUnits ? gate_rows() : first + kCellUnits;
    to_weight(p.to_gates_ih, p.input, p.input_size, first, end, p.grad_w_ih);
    to_weight(p.to_gates_hh, p.h, p.hidden_size, first, end, p.grad_w_hh);
    to_bias(p.to_gates_ih, first, end, p.grad_b_ih);
    to_bias(p.to_gates_hh, first, end, p.grad_b_hh);
  }

  __attribute__((noinline)) void to_weight(const void* to_gates, const RowsOperand& operand, int64_t columns,
                                           int64_t first, int64_t end, void* grad) const {
    if (grad == nullptr) return;
    int64_t j = first;
    for (; j + kOuterRows <= end; j += kOuterRows) outer_rows<kOuterRows>(to_gates, operand, columns, j, grad);
    for (; j < end; ++j) outer_rows<1>(to_gates, operand, columns, j, grad);
  }
  template <int kRows>
  FASTGEN_MEMBER void outer_rows(const void* to_gates, const RowsOperand& operand, int64_t columns, int64_t j,
                                 void* grad) const {
    int64_t k = 0;
    for (; k + kOuterVectors * kWidth <= columns; k += kOuterVectors * kWidth) {
      outer<kRows, kOuterVectors>(to_gates, operand, columns, j, k, kWidth, grad);
    }
    for (; k < columns; k += kWidth) {
      const int count = columns - k < kWidth ? int(columns - k) : kWidth;
      outer<kRows, 1>(to_gates, operand, columns, j, k, count, grad);
    }
  }

  // kRows rows from j on by kVectors vectors from k on of dG^T x, the last of which has `count` columns.
  template <int kRows, int kVectors>
  FASTGEN_MEMBER void outer(const void* to_gates, const RowsOperand& operand, int64_t columns, int64_t j, int64_t k,
                            int count, void* grad) const {
    const Rows<Storage> rows = rows_of<Storage>(operand);
    const T* gates = static_cast<const T*>(to_gates) + j;
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
        const F g(gates[b * gate_rows() + i]);
        FASTGEN_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(g, x[v], sums[i][v]);
      }
    }
    FASTGEN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        put(static_cast<Storage*>(grad) + (j + i) * columns + k + v * kWidth, sums[i][v], count);
      }
    }
  }

  FASTGEN_MEMBER void to_bias(const void* to_gates, int64_t first, int64_t end, void* grad) const {
    if (grad == nullptr) return;
    for (int64_t j = first; j < end; j += kWidth) {
      const int count = end - j < kWidth ? int(end - j) : kWidth;
      F sum(T(0));
      for (int64_t b = 0; b < p.batch; ++b) {
        sum = sum + take<F>(static_cast<const T*>(to_gates) + b * gate_rows() + j, count);
      }
      put(static_cast<Storage*>(grad) + j, sum, count);
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

}  // namespace
}  // namespace fastgen
