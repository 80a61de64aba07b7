// Cells that need the whole row of a step's units, once over Isa (after a vec_*.h): layer norm and zoneout.
//
//   LSTM with layer norm (Ba, Kiros & Hinton, 2016):  sums = LN(W_ih x) + LN(W_hh h) + b, h' = o tanh(LN(c'))
//   zoneout (Krueger et al., 2017):                   c <- d c + (1 - d) c', h <- d h + (1 - d) h'
#pragma once

#include <cmath>

#include "../common/activations.h"
#include "fill.inl"
#include "lanes.inl"

namespace fastgen {
namespace {

// `count` lanes of x; zero past them.
template <class T, class F>
FASTGEN_FN F first_lanes(F x, int count) {
  if (count == kLanes<T>) return x;
  alignas(64) T lanes[kLanes<T>];
  store(lanes, x);
  load_first(lanes, count, x);
  return x;
}

template <class T>
FASTGEN_FN int lanes_left(int64_t first, int64_t size) {
  return size - first < kLanes<T> ? int(size - first) : kLanes<T>;
}

// A row's sums of several gates, vector by vector: gate g of the units from j on stands at place(g, j).
template <class T>
struct GateRow {  // one gate behind the other
  int64_t stride;
  FASTGEN_MEMBER int64_t place(int gate, int64_t unit) const { return gate * stride + unit; }
};
template <class T, int kGates>
struct PanelRow {  // as the panels of a product have them
  FASTGEN_MEMBER int64_t place(int gate, int64_t unit) const { return unit * kGates + gate * kLanes<T>; }
};

// The d of zoneout for `count` units: 1 where the unit keeps its value, from element `first` of the draws on; or,
// where nothing is drawn, the share of it that is kept. Whole vectors are written.
template <class T>
__attribute__((noinline)) void zones(const CellOptions& p, double probability, uint64_t first, int64_t count, T* out) {
  using F = typename Work<T>::F;
  if (!p.zoneout_drawn) {
    for (int64_t j = 0; j < count; j += kLanes<T>) store(out + j, F(T(probability)));
    return;
  }
  RandomParams draw{};
  draw.a = nearbyint(probability * 0x1p32);
  const Bernoulli kept(draw);
  const PhiloxKey key(p.seed);
  alignas(64) float tile[kPiece];
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t size = count - begin < kPiece ? count - begin : kPiece;
    fill<float>(tile, p.offset + first + uint64_t(begin), size, key, kept);
    for (int64_t j = 0; j < size; ++j) out[begin + j] = tile[j];
  }
  for (int64_t j = count; j % kLanes<T> != 0; ++j) out[j] = T(0);
}

// x <- (x - mean) s over the first `gates` gates of a row, s = 1 / sqrt(variance + eps), which is the result.
template <class T, class Layout>
__attribute__((noinline)) T standardise(const Layout& layout, int gates, int64_t units, double eps, T* x) {
  using F = typename Work<T>::F;
  F total(T(0)), squares(T(0)), value;
  for (int64_t j = 0; j < units; j += kLanes<T>) {
    for (int g = 0; g < gates; ++g) total = total + take<F>(x + layout.place(g, j), lanes_left<T>(j, units));
  }
  const T count = T(gates * units);
  const F mean(sum(total) / count);
  for (int64_t j = 0; j < units; j += kLanes<T>) {
    for (int g = 0; g < gates; ++g) {
      T* at = x + layout.place(g, j);
      load(at, value);
      value = first_lanes<T>(value - mean, lanes_left<T>(j, units));
      squares = multiply_add(value, value, squares);
      store(at, value);
    }
  }
  const F scale = F(T(1)) / root(F(sum(squares) / count + T(eps)));
  for (int64_t j = 0; j < units; j += kLanes<T>) {
    for (int g = 0; g < gates; ++g) {
      T* at = x + layout.place(g, j);
      load(at, value);
      store(at, value * scale);
    }
  }
  alignas(64) T lanes[kLanes<T>];
  store(lanes, scale);
  return lanes[0];
}

// One row of a step. from_input and from_state hold W_ih x and W_hh h, the biases in from_input but with layer norm
// (and but a GRU's b_hn); both are overwritten.
template <CellMode kMode, class Storage, class Layout>
struct RowCell {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  static constexpr int kWidth = kLanes<T>;

  const CellOptions& p;
  int64_t hidden_size;
  Layout layout;
  const void *b_ih, *b_hh;  // null: none

  FASTGEN_MEMBER F parameter(const void* data, int64_t at, int count) const {
    return data == nullptr ? F(T(0)) : take<F>(static_cast<const Storage*>(data) + at, count);
  }
  // Sums of a gate of the units from j on.
  FASTGEN_MEMBER F sums(int gate, int64_t j, int count, const T* from_input, const T* from_state) const {
    F x, y;
    load(from_input + layout.place(gate, j), x);
    load(from_state + layout.place(gate, j), y);
    if (p.norm_ih == nullptr) return x + y;
    const int64_t at = gate * hidden_size + j;
    const F bias = parameter(b_ih, at, count) + parameter(b_hh, at, count);
    return multiply_add(x, parameter(p.norm_ih, at, count), multiply_add(y, parameter(p.norm_hh, at, count), bias));
  }

  // The row of an LSTM. c: the cells, [units] in whole vectors, which change. gates, cells: where to keep a row for the
  // backward pass, or null. keep: d of the cells, null where none is kept. out(j, h) takes h, before any zoneout.
  template <class Out>
  FASTGEN_MEMBER void lstm(T* from_input, T* from_state, T* c, const T* keep, Storage* gates, T* cells,
                           const Out& out) const {
    const int64_t units = hidden_size;
    if (p.norm_ih != nullptr) {
      T* const sides[] = {from_input, from_state};
      for (int side = 0; side < 2; ++side) {
        const T scale = standardise(layout, 4, units, p.norm_eps, sides[side]);
        if (gates == nullptr) continue;
        cells[units + side] = scale;
        for (int64_t j = 0; j < units; j += kWidth) {
          for (int g = 0; g < 4; ++g) {
            F value;
            load(sides[side] + layout.place(g, j), value);
            put(gates + (4 + 4 * side + g) * units + j, value, lanes_left<T>(j, units));
          }
        }
      }
    }
    // What the second half of the step needs takes the place of the sums: c' that of i, and o its own.
    for (int64_t j = 0; j < units; j += kWidth) {
      const int count = lanes_left<T>(j, units);
      F before;
      load(c + j, before);
      const F i = sigmoid<T, U>(sums(0, j, count, from_input, from_state)),
              f = sigmoid<T, U>(sums(1, j, count, from_input, from_state)),
              g = hyperbolic_tangent<T, U>(sums(2, j, count, from_input, from_state)),
              o = sigmoid<T, U>(sums(3, j, count, from_input, from_state));
      const F after = multiply_add(f, before, i * g);
      if (gates != nullptr) {
        const F all[] = {i, f, g, o};
        for (int k = 0; k < 4; ++k) put(gates + k * units + j, all[k], count);
      }
      F kept = after;
      if (keep != nullptr) {
        F d;
        load(keep + j, d);
        kept = multiply_add(d, before, (F(T(1)) - d) * after);
      }
      store(c + j, kept);
      if (cells != nullptr) put(cells + j, kept, count);
      store(from_input + layout.place(0, j), after);
      store(from_state + layout.place(3, j), o);
    }
    if (p.norm_ih != nullptr) standardise(layout, 1, units, p.norm_eps, from_input);
    for (int64_t j = 0; j < units; j += kWidth) {
      const int count = lanes_left<T>(j, units);
      F y, o;
      load(from_input + layout.place(0, j), y);
      load(from_state + layout.place(3, j), o);
      if (p.norm_ih != nullptr) y = multiply_add(y, parameter(p.norm_c, j, count), parameter(p.norm_c_bias, j, count));
      out(j, o * hyperbolic_tangent<T, U>(y));
    }
  }

  // The row of a GRU; h: the states before it.
  template <class Out>
  FASTGEN_MEMBER void gru(const T* from_input, const T* from_state, const T* h, Storage* gates, const Out& out) const {
    for (int64_t j = 0; j < hidden_size; j += kWidth) {
      const int count = lanes_left<T>(j, hidden_size);
      F x, y, before;
      load(h + j, before);
      const F r = sigmoid<T, U>(sums(0, j, count, from_input, from_state)),
              z = sigmoid<T, U>(sums(1, j, count, from_input, from_state));
      load(from_input + layout.place(2, j), x);
      load(from_state + layout.place(2, j), y);
      y = y + parameter(b_hh, 2 * hidden_size + j, count);
      const F n = hyperbolic_tangent<T, U>(multiply_add(r, y, x));
      if (gates != nullptr) {
        const F all[] = {r, z, n, y};
        for (int k = 0; k < 4; ++k) put(gates + k * hidden_size + j, all[k], count);
      }
      out(j, multiply_add(z, before - n, n));
    }
  }

  // The row of an Elman RNN.
  template <class Out>
  FASTGEN_MEMBER void elman(bool relu, const T* from_input, const T* from_state, Storage* gates, const Out& out) const {
    for (int64_t j = 0; j < hidden_size; j += kWidth) {
      const int count = lanes_left<T>(j, hidden_size);
      const F x = sums(0, j, count, from_input, from_state);
      const F h = relu ? larger(F(T(0)), x) : hyperbolic_tangent<T, U>(x);
      if (gates != nullptr) put(gates + j, h, count);
      out(j, h);
    }
  }
};

// The backward pass of a row of an LSTM.
template <class Storage>
struct LstmRowBackward {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  static constexpr int kWidth = kLanes<T>;

  const RecurrentBackwardParams& p;
  int64_t stride;  // of the rows of `temporary`, whole vectors

  FASTGEN_MEMBER F parameter(const void* data, int64_t at, int count) const {
    return take<F>(static_cast<const Storage*>(data) + at, count);
  }

  // From dh, the gradient of h before projection and zoneout, and dc, that of the cells, which becomes that of the
  // cells before. row: its number; c: the cells before; keep: d of the cells, or null; temporary: [6][stride];
  // fed: where to put the gradient of W_hh h once more, or null.
  template <class Left>
  FASTGEN_MEMBER void run(int64_t row, const T* c, const T* dh, T* dc, const T* keep, T* temporary, Left* fed) const {
    const int64_t units = p.hidden_size;
    const bool norm = p.norm_ih != nullptr;
    const GateRow<T> of_gates{stride};
    const F one(T(1));
    const Storage* gates = static_cast<const Storage*>(p.gates) + row * saved_gates(p) * units;
    const T* cells = static_cast<const T*>(p.cells) + row * (units + saved_scales(p));
    Storage* out = static_cast<Storage*>(p.grad_gates) + row * gate_gradients(p) * units;
    T *to_gates = temporary, *y = temporary + 4 * stride, *to_y = temporary + 5 * stride;

    // c' as it was before zoneout.
    for (int64_t j = 0; j < units; j += kWidth) {
      const int count = lanes_left<T>(j, units);
      F after = take<F>(cells + j, count), before;
      if (keep != nullptr) {
        load(c + j, before);
        after = multiply_add(take<F>(gates + units + j, count), before,
                             take<F>(gates + j, count) * take<F>(gates + 2 * units + j, count));
      }
      store(y + j, after);
    }
    const T scale_c = norm ? standardise(of_gates, 1, units, p.norm_eps, y) : T(1);

    // o, and what tanh took.
    F along(T(0)), across(T(0));
    for (int64_t j = 0; j < units; j += kWidth) {
      const int count = lanes_left<T>(j, units);
      const F o = take<F>(gates + 3 * units + j, count);
      F x, grad;
      load(y + j, x);
      load(dh + j, grad);
      grad = first_lanes<T>(grad, count);
      F argument = x;
      if (norm) argument = multiply_add(x, parameter(p.norm_c, j, count), parameter(p.norm_c_bias, j, count));
      const F h = hyperbolic_tangent<T, U>(argument);
      if (p.hidden != nullptr) put(static_cast<Storage*>(p.hidden) + row * units + j, o * h, count);
      store(to_gates + 3 * stride + j, grad * h * o * (one - o));
      F to_argument = grad * o * (one - h * h);
      if (norm) {
        put(out + 12 * units + j, to_argument, count);
        put(out + 13 * units + j, x, count);
        to_argument = to_argument * parameter(p.norm_c, j, count);
        along = along + to_argument;
        across = multiply_add(to_argument, x, across);
      }
      store(to_y + j, to_argument);
    }
    const F mean_c(sum(along) / T(units)), slope_c(sum(across) / T(units)), scale(scale_c);

    for (int64_t j = 0; j < units; j += kWidth) {
      const int count = lanes_left<T>(j, units);
      const F i = take<F>(gates + j, count), f = take<F>(gates + units + j, count),
              g = take<F>(gates + 2 * units + j, count);
      F x, grad, from_c, before;
      load(y + j, x);
      load(to_y + j, grad);
      load(dc + j, from_c);
      load(c + j, before);
      if (norm) grad = scale * (grad - mean_c - x * slope_c);
      F past(T(0));
      if (keep != nullptr) {
        F d;
        load(keep + j, d);
        past = d * from_c;
        from_c = (one - d) * from_c;
      }
      grad = first_lanes<T>(grad + from_c, count);
      store(dc + j, multiply_add(grad, f, past));
      store(to_gates + j, grad * g * i * (one - i));
      store(to_gates + stride + j, grad * before * f * (one - f));
      store(to_gates + 2 * stride + j, grad * i * (one - g * g));
    }

    if (!norm) {
      for (int64_t j = 0; j < units; j += kWidth) {
        for (int k = 0; k < 4; ++k) {
          F grad;
          load(to_gates + k * stride + j, grad);
          give(grad, k * units + j, lanes_left<T>(j, units), out, fed);
        }
      }
      return;
    }
    const void* const gains[] = {p.norm_hh, p.norm_ih};
    for (int side = 0; side < 2; ++side) {  // W_hh h, and W_ih x
      const Storage* hat = gates + (side == 0 ? 8 : 4) * units;
      along = across = F(T(0));
      for (int64_t j = 0; j < units; j += kWidth) {
        const int count = lanes_left<T>(j, units);
        for (int k = 0; k < 4; ++k) {
          F grad;
          load(to_gates + k * stride + j, grad);
          grad = grad * parameter(gains[side], k * units + j, count);
          along = along + grad;
          across = multiply_add(grad, take<F>(hat + k * units + j, count), across);
        }
      }
      const F mean(sum(along) / T(4 * units)), slope(sum(across) / T(4 * units)), spread(cells[units + 1 - side]);
      for (int64_t j = 0; j < units; j += kWidth) {
        const int count = lanes_left<T>(j, units);
        for (int k = 0; k < 4; ++k) {
          F grad;
          load(to_gates + k * stride + j, grad);
          if (side == 0) put(out + (8 + k) * units + j, grad, count);
          grad = grad * parameter(gains[side], k * units + j, count);
          grad = spread * (grad - mean - take<F>(hat + k * units + j, count) * slope);
          give(grad, k * units + j, count, out + 4 * side * units, side == 0 ? fed : static_cast<Left*>(nullptr));
        }
      }
    }
  }

  template <class Left>
  static FASTGEN_MEMBER void give(F grad, int64_t at, int count, Storage* out, Left* fed) {
    put(out + at, grad, count);
    if (fed != nullptr) put(fed + at, grad, count);
  }
};

}  // namespace
}  // namespace fastgen
