// The backward pass of one step past its products: the gradients of the sums before the gates, and what reaches the
// states directly. Written once over Isa.
#pragma once

#include "../common/activations.h"
#include "dot.inl"

namespace fastgen {
namespace {

template <class Storage, CellMode kMode>
struct CellBackward {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kGates = kMode == CellMode::kLstm ? 4 : kMode == CellMode::kGru ? 3 : 1;

  const CellBackwardParams& p;

  FASTGEN_MEMBER void run(int64_t begin, int64_t end) const {
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
    put(static_cast<T*>(data) + (row * kGates + gate) * p.hidden_size + unit, value, count);
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
        put(static_cast<T*>(p.direct) + i, dh * update, count);
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
};

}  // namespace
}  // namespace fastgen
