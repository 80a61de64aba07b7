// One step of a recurrent layer: products in dot form on torch's own weights,
// biases, gates and state in the same pass. Written once over Isa.
//
//   LSTM  c' = f c + i g, h' = o tanh(c')
//   GRU   n = tanh(x_n + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h
//   RNN   h' = act(W_ih x + b_ih + W_hh h + b_hh)
//
// With layer norm or zoneout in two passes: the sums of all units, and the rows of the batch (cell_rows.inl).
#include "cell_backward.inl"
#include "cell_rows.inl"
#include "dot.inl"

namespace fastgen {
namespace {

// The sums before the gates of kCellUnits units and a tile of rows, and what is made of them.
template <class Storage, CellMode kMode>
struct Cell {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  static constexpr int kWidth = kLanes<T>;
  // Gates of the weights. The sums of a GRU's candidate are kept apart: input side in place 2, state side in 3.
  static constexpr int kGates = kMode == CellMode::kLstm ? 4 : kMode == CellMode::kGru ? 3 : 1;
  static constexpr int kSums = kMode == CellMode::kGru ? 4 : kGates;
  static constexpr int kKept = kSums;

  const CellParams& p;
  const Term<Storage> input, state;

  FASTGEN_MEMBER explicit Cell(const CellParams& params)
      : p(params),
        input{rows_of<Storage>(p.w_ih), rows_of<Storage>(p.input), p.input_size},
        state{rows_of<Storage>(p.w_hh), rows_of<Storage>(p.h), p.state_size} {}

  FASTGEN_MEMBER void run(int64_t begin, int64_t end) const {
    if (by_rows(p)) return sums(begin, end);
    alignas(64) T sums[kDotRows][kSums][kCellUnits];
    constexpr int64_t kStride = kSums * kCellUnits;
    const Term<Storage> both[] = {input, state}, from_input[] = {input}, from_state[] = {state};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t unit = block * kCellUnits;
      const int64_t units = p.hidden_size - unit < kCellUnits ? p.hidden_size - unit : kCellUnits;
      for (int64_t row = 0; row < p.batch; row += kDotRows) {
        const int64_t rows = p.batch - row < kDotRows ? p.batch - row : kDotRows;
        for (int g = 0; g < kGates; ++g) {
          const int64_t first = g * p.hidden_size + unit;
          if (kMode == CellMode::kGru && g == 2) {
            dot_tile(from_input, row, rows, first, units, sums[0][2], kStride);
            dot_tile(from_state, row, rows, first, units, sums[0][3], kStride);
          } else {
            dot_tile(both, row, rows, first, units, sums[0][g], kStride);
          }
        }
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < units; i += kWidth) {
            const int count = units - i < kWidth ? int(units - i) : kWidth;
            finish(row + r, unit + i, count, sums[r], i);
          }
        }
      }
    }
  }

  // The products alone, of a cell that needs whole rows.
  FASTGEN_MEMBER void sums(int64_t begin, int64_t end) const {
    const int64_t stride = cell_stride(p), row_size = cell_row_size(p);
    const Term<Storage> from_input[] = {input}, from_state[] = {state};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t unit = block * kCellUnits;
      const int64_t units = p.hidden_size - unit < kCellUnits ? p.hidden_size - unit : kCellUnits;
      for (int64_t row = 0; row < p.batch; row += kDotRows) {
        const int64_t rows = p.batch - row < kDotRows ? p.batch - row : kDotRows;
        for (int g = 0; g < kGates; ++g) {
          const int64_t first = g * p.hidden_size + unit;
          T* out = static_cast<T*>(p.sums) + row * row_size + g * stride + unit;
          dot_tile(from_input, row, rows, first, units, out, row_size);
          dot_tile(from_state, row, rows, first, units, out + kGates * stride, row_size);
        }
      }
    }
  }

  // Rows [begin, end) of the batch, from their sums.
  void rows(int64_t begin, int64_t end) const {
    const int64_t stride = cell_stride(p), units = p.hidden_size;
    const RowCell<kMode, Storage, GateRow<T>> row_cell{p, units, {stride}, p.b_ih, p.b_hh};
    for (int64_t row = begin; row < end; ++row) {
      T* from_input = static_cast<T*>(p.sums) + row * cell_row_size(p);
      T *from_state = from_input + kGates * stride, *before = from_state + kGates * stride, *keep = before + stride;
      if (p.norm_ih == nullptr && p.b_ih != nullptr) {
        for (int g = 0; g < kGates; ++g) {
          for (int64_t j = 0; j < units; j += kWidth) {
            const int count = lanes_left<T>(j, units);
            F value;
            load(from_input + g * stride + j, value);
            value = value + bias(p.b_ih, g, j, count);
            if (kMode != CellMode::kGru || g < 2) value = value + bias(p.b_hh, g, j, count);
            store(from_input + g * stride + j, value);
          }
        }
      }
      const Storage* h = state.x[row];
      Storage* h_1 = static_cast<Storage*>(p.h_1) + row * units;
      const auto out = [&](int64_t j, F value) {
        const int count = lanes_left<T>(j, units);
        if (p.zoneout_h > 0) {
          const F d(T(p.zoneout_h));
          value = multiply_add(d, take<F>(h + j, count), (F(T(1)) - d) * value);
        }
        put(h_1 + j, value, count);
      };
      if constexpr (kMode == CellMode::kLstm) {
        const int64_t at = (p.c.index == nullptr ? row : p.c.index[row]) * p.c.stride;
        for (int64_t j = 0; j < units; j += kWidth) {
          store(before + j, take<F>(static_cast<const Storage*>(p.c.data) + at + j, lanes_left<T>(j, units)));
        }
        if (p.zoneout_c > 0) zones(p, p.zoneout_c, 0, units, keep);
        row_cell.lstm(from_input, from_state, before, p.zoneout_c > 0 ? keep : nullptr, nullptr, nullptr, out);
        for (int64_t j = 0; j < units; j += kWidth) {
          F value;
          load(before + j, value);
          put(static_cast<Storage*>(p.c_1) + at + j, value, lanes_left<T>(j, units));
        }
      } else if constexpr (kMode == CellMode::kGru) {
        for (int64_t j = 0; j < units; j += kWidth) store(before + j, take<F>(h + j, lanes_left<T>(j, units)));
        row_cell.gru(from_input, from_state, before, nullptr, out);
      } else {
        row_cell.elman(kMode == CellMode::kRelu, from_input, from_state, nullptr, out);
      }
    }
  }

  FASTGEN_MEMBER F bias(const void* data, int gate, int64_t unit, int count) const {
    return take<F>(static_cast<const Storage*>(data) + gate * p.hidden_size + unit, count);
  }

  FASTGEN_MEMBER void keep(int64_t row, int gate, int64_t unit, int count, F value) const {
    if (p.gates == nullptr) return;
    put(static_cast<Storage*>(p.gates) + (kKept * row + gate) * p.hidden_size + unit, value, count);
  }
  FASTGEN_MEMBER void finish_elman(Storage* h_1, int64_t row, int64_t unit, int count, F value) const {
    put(h_1, value, count);
    keep(row, 0, unit, count, value);
  }

  FASTGEN_MEMBER void finish(int64_t row, int64_t unit, int count, const T (&sums)[kSums][kCellUnits],
                             int64_t i) const {
    F s[kSums];
    for (int g = 0; g < kSums; ++g) load(&sums[g][i], s[g]);
    if (p.b_ih != nullptr) {
      for (int g = 0; g < kGates; ++g) {
        const F from_input = bias(p.b_ih, g, unit, count), from_state = bias(p.b_hh, g, unit, count);
        if (kMode == CellMode::kGru && g == 2) {
          s[2] = s[2] + from_input;
          s[kSums - 1] = s[kSums - 1] + from_state;
        } else {
          s[g] = s[g] + (from_input + from_state);
        }
      }
    }
    Storage* h_1 = static_cast<Storage*>(p.h_1) + row * p.hidden_size + unit;
    if constexpr (kMode == CellMode::kLstm) {
      const int64_t at = (p.c.index == nullptr ? row : p.c.index[row]) * p.c.stride + unit;
      const F c = take<F>(static_cast<const Storage*>(p.c.data) + at, count);
      const F in = sigmoid<T, U>(s[0]), forget = sigmoid<T, U>(s[1]), out = sigmoid<T, U>(s[3]);
      const F cell = hyperbolic_tangent<T, U>(s[2]);
      const F c_1 = multiply_add(forget, c, in * cell);
      put(static_cast<Storage*>(p.c_1) + at, c_1, count);
      put(h_1, out * hyperbolic_tangent<T, U>(c_1), count);
      if (p.cells != nullptr) put(static_cast<T*>(p.cells) + row * p.hidden_size + unit, c_1, count);
      keep(row, 0, unit, count, in);
      keep(row, 1, unit, count, forget);
      keep(row, 2, unit, count, cell);
      keep(row, 3, unit, count, out);
    } else if constexpr (kMode == CellMode::kGru) {
      const F h = take<F>(state.x[row] + unit, count);
      const F reset = sigmoid<T, U>(s[0]), update = sigmoid<T, U>(s[1]);
      const F candidate = hyperbolic_tangent<T, U>(multiply_add(reset, s[3], s[2]));
      put(h_1, multiply_add(update, h - candidate, candidate), count);
      keep(row, 0, unit, count, reset);
      keep(row, 1, unit, count, update);
      keep(row, 2, unit, count, candidate);
      keep(row, 3, unit, count, s[3]);
    } else if constexpr (kMode == CellMode::kTanh) {
      finish_elman(h_1, row, unit, count, hyperbolic_tangent<T, U>(s[0]));
    } else {
      finish_elman(h_1, row, unit, count, larger(F(T(0)), s[0]));  // a NaN in the second argument passes
    }
  }
};

#define FASTGEN_BY_MODE(step, part)                                                  \
  switch (p.mode) {                                                                  \
    case CellMode::kLstm: return step<Storage, CellMode::kLstm>{p}.part(begin, end); \
    case CellMode::kGru: return step<Storage, CellMode::kGru>{p}.part(begin, end);   \
    case CellMode::kTanh: return step<Storage, CellMode::kTanh>{p}.part(begin, end); \
    case CellMode::kRelu: return step<Storage, CellMode::kRelu>{p}.part(begin, end); \
  }

template <class Storage>
void recurrent_cell_as(const CellParams& p, int64_t begin, int64_t end) {
  FASTGEN_BY_MODE(Cell, run)
}
template <class Storage>
void recurrent_cell_rows_as(const CellParams& p, int64_t begin, int64_t end) {
  FASTGEN_BY_MODE(Cell, rows)
}
template <class Storage>
void recurrent_cell_backward_as(const CellBackwardParams& p, int64_t begin,
                                int64_t end){FASTGEN_BY_MODE(CellBackward, run)}
#undef FASTGEN_BY_MODE

#define FASTGEN_BY_DTYPE(function)                                   \
  switch (p.dtype) {                                                 \
    case DType::kFloat64: return function<double>(p, begin, end);    \
    case DType::kBFloat16: return function<BFloat16>(p, begin, end); \
    case DType::kFloat16: return function<Float16>(p, begin, end);   \
    default: return function<float>(p, begin, end);                  \
  }

void recurrent_cell(const CellParams& p, int64_t begin, int64_t end) {
  FASTGEN_BY_DTYPE(recurrent_cell_as)
}
void recurrent_cell_rows(const CellParams& p, int64_t begin, int64_t end) { FASTGEN_BY_DTYPE(recurrent_cell_rows_as) }
void recurrent_cell_backward(const CellBackwardParams& p, int64_t begin, int64_t end) {
  FASTGEN_BY_DTYPE(recurrent_cell_backward_as)
}
#undef FASTGEN_BY_DTYPE

}  // namespace
}  // namespace fastgen
