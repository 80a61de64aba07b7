// The backward pass of recurrent.inl.
//
// From the last step to the first: the gradient of a step's gates before their activations, dG, follows from dh and dc
// by elements; dh of the step before is dG W_hh, whose tiles the next elements take up at once. All dG stay, so that
// the gradients of the input and of the weights are one product each, over all rows of all steps:
//   dX = dG W_ih    dW_ih = dG^T X    dW_hh = dG^T H, H the states that the steps began with.
// A GRU's n has a gradient of its own on the hidden side: r d(n). With layer norm all gates have.
#pragma once

#include "recurrent.inl"

namespace fastgen {
namespace {

template <class Storage, class A>
class RecurrenceBackward {
  using T = typename A::T;
  using F = typename A::F;
  using U = typename fastgen::Work<T>::U;
  using Left = typename A::Left;
  using Right = typename A::Right;
  using Work = RecurrentBackwardWork;
  static constexpr int kWidth = kLanes<T>, kColumns = kFlatVectors * kWidth, kRows = kTileRows<kFlatVectors>;
  static constexpr int64_t kRowsOfInput = 96;  // rows of dX made at once
  static constexpr int64_t kTemporaries = 7;   // of a row of LSTM cells: c before, and those of LstmRowBackward

 public:
  explicit RecurrenceBackward(const RecurrentBackwardParams& params)
      : p(params),
        lstm(p.mode == CellMode::kLstm),
        gru(p.mode == CellMode::kGru),
        norm(p.norm_ih != nullptr),
        rows_form(by_rows(p)),
        in_place(sizeof(Storage) == sizeof(Left) && p.hidden_size % A::kDepth == 0),
        gates(gate_count(p.mode) * p.hidden_size),
        gate_stride(gate_gradients(p) * p.hidden_size),
        cell_stride(p.hidden_size + saved_scales(p)),
        own(norm  ? 0
            : gru ? 2 * p.hidden_size
                  : gates),
        apart(norm ? gates : p.hidden_size),
        gates_depth(round_up<int64_t>(gates, A::kDepth)),
        state_depth(round_up<int64_t>(p.output_size, A::kDepth)),
        state_stride(round_up<int64_t>(p.output_size, kColumns)),
        unit_stride(round_up<int64_t>(p.hidden_size, kColumns)),
        input_stride(round_up<int64_t>(p.input_size, kColumns)),
        blocks(state_stride / kColumns),
        projection_blocks(p.w_hr == nullptr ? 0 : unit_stride / kColumns),
        input_blocks(p.grad_input == nullptr ? 0 : input_stride / kColumns) {
    Arena arena(p.packed);
    w_hh = arena.take<Right>(blocks * gates_depth * kColumns);
    w_hr = arena.take<Right>(projection_blocks * state_depth * kColumns);
    w_ih = arena.take<Right>(input_blocks * gates_depth * kColumns);
    packed_bytes = arena.used();
  }

  RecurrentBackwardSizes sizes(int64_t rows) const {
    RecurrentBackwardSizes sizes;
    sizes.blocks = blocks;
    sizes.projection_blocks = projection_blocks;
    sizes.panels = blocks + projection_blocks + input_blocks;
    sizes.packed = packed_bytes;
    sizes.scratch = Scratch(*this, nullptr, rows).bytes;
    sizes.input_scratch = InputScratch(*this, nullptr).bytes;
    sizes.weight_scratch = TransposedProduct<A>::scratch_bytes(p.rows);
    return sizes;
  }

  void run(const Work& work) const {
    switch (work.phase) {
      case RecurrentBackwardPhase::kPack:
        for (int64_t i = work.first_block; i < work.end_block; ++i) pack(i);
        return;
      case RecurrentBackwardPhase::kPoint: return point(work);
      case RecurrentBackwardPhase::kInput: return to_input(work);
      case RecurrentBackwardPhase::kWeights: return to_weights(work);
      default: break;
    }
    const Scratch scratch(*this, work.scratch, work.end_row - work.first_row);
    switch (work.phase) {
      case RecurrentBackwardPhase::kRows: return rows(work, scratch);
      case RecurrentBackwardPhase::kStart: return start(work, scratch);
      case RecurrentBackwardPhase::kReturn: return give_back(work, scratch);
      case RecurrentBackwardPhase::kEmit: return take_rows(work, scratch);
      case RecurrentBackwardPhase::kStep: return step(work, scratch);
      case RecurrentBackwardPhase::kCells: return cells(work, scratch);
      default: return finish(work, scratch);
    }
  }

 private:
  struct Scratch {
    T* dh;         // [rows][state_stride]: what reaches the h of a step from later ones
    T* dc;         // [rows][unit_stride]
    T* direct;     // [rows][state_stride]: what reaches the h before past the product: of a GRU z dh, of zoneout d dh
    Left* fed[2];  // [rows][gates_depth]: dG of the step before and of this one, where it is not fed in place
    Left* outer;   // [rows][state_stride]: d h behind the projection
    // By rows only:
    T* to_raw;     // [rows][unit_stride]: d h before the projection
    T* keep;       // [rows][state_stride or unit_stride]: d of zoneout
    T* temporary;  // [rows][temporaries][unit_stride]
    int64_t bytes;

    FASTGEN_MEMBER Scratch(const RecurrenceBackward& of, void* base, int64_t rows) {
      Arena arena(base);
      dh = arena.take<T>(rows * of.state_stride);
      dc = arena.take<T>(of.lstm ? rows * of.unit_stride : 0);
      direct = arena.take<T>(of.has_direct() ? rows * of.state_stride : 0);
      fed[0] = arena.take<Left>(of.in_place ? 0 : rows * of.gates_depth);
      fed[1] = arena.take<Left>(of.in_place ? 0 : rows * of.gates_depth);
      outer = arena.take<Left>(of.p.w_hr != nullptr ? rows * of.state_stride : 0);
      if (of.rows_form) {
        to_raw = arena.take<T>(of.p.w_hr != nullptr ? rows * of.unit_stride : 0);
        keep = arena.take<T>(rows * of.keep_stride());
        temporary = arena.take<T>(of.lstm ? rows * kTemporaries * of.unit_stride : 0);
      }
      bytes = arena.used();
    }
  };
  struct InputScratch {
    T* sums;     // [kRowsOfInput][input_stride]
    Left* copy;  // [kRowsOfInput][gates_depth], where dG does not enter as it is stored
    int64_t bytes;

    FASTGEN_MEMBER InputScratch(const RecurrenceBackward& of, void* base) {
      Arena arena(base);
      sums = arena.take<T>(kRowsOfInput * of.input_stride);
      copy = arena.take<Left>(of.in_place ? 0 : kRowsOfInput * of.gates_depth);
      bytes = arena.used();
    }
  };

  bool has_direct() const { return gru || p.zoneout_h > 0; }
  int64_t keep_stride() const { return state_stride > unit_stride ? state_stride : unit_stride; }

  void pack(int64_t i) const {
    if (i < blocks) {
      return pack_panel<A, kFlatVectors>(MatrixRows<Storage>{p.w_hh, p.output_size}, 0, gates, i * kColumns,
                                         p.output_size, w_hh + i * gates_depth * kColumns);
    }
    i -= blocks;
    if (i < projection_blocks) {
      return pack_panel<A, kFlatVectors>(MatrixRows<Storage>{p.w_hr, p.hidden_size}, 0, p.output_size, i * kColumns,
                                         p.hidden_size, w_hr + i * state_depth * kColumns);
    }
    i -= projection_blocks;
    pack_panel<A, kFlatVectors>(MatrixRows<Storage>{p.w_ih, p.input_size}, 0, gates, i * kColumns, p.input_size,
                                w_ih + i * gates_depth * kColumns);
  }

  void rows(const Work& all, const Scratch& scratch) const {
    Work work = all;
    start(work, scratch);
    work.first_block = 0;
    for (work.first_step = p.steps - 1; work.first_step >= 0; --work.first_step) {
      if (rows_form) {
        const auto part = [&](void (RecurrenceBackward::*phase)(const Work&, const Scratch&) const, int64_t end) {
          work.end_block = end;
          (this->*phase)(work, scratch);
        };
        const int64_t count = work.end_row - work.first_row;
        part(&RecurrenceBackward::give_back, blocks);
        if (p.w_hr != nullptr) {
          part(&RecurrenceBackward::take_rows, count);
          part(&RecurrenceBackward::step, projection_blocks);
        }
        part(&RecurrenceBackward::cells, count);
        continue;
      }
      if (p.w_hr != nullptr) {
        work.end_block = blocks;
        give_back(work, scratch);
      }
      work.end_block = p.w_hr != nullptr ? projection_blocks : blocks;
      step(work, scratch);
    }
    if (p.grad_h_0 != nullptr) {
      work.end_block = blocks;
      give_back(work, scratch);  // with first_step = -1: what reaches the initial states
    }
    finish(work, scratch);
  }

  // Rows of the step that comes s-th; none before the first and after the last.
  FASTGEN_MEMBER int64_t rows_at(const Work& work, int64_t s) const {
    if (s < 0 || s >= p.steps) return 0;
    const int64_t active = active_rows(p, time_of(p, s));
    const int64_t end = active < work.end_row ? active : work.end_row;
    return end > work.first_row ? end - work.first_row : 0;
  }

  void start(const Work& work, const Scratch& scratch) const {
    const auto* dh = static_cast<const Storage*>(p.grad_h_n);
    const auto* dc = static_cast<const Storage*>(p.grad_c_n);
    for (int64_t b = work.first_row; b < work.end_row; ++b) {
      const int64_t at = b - work.first_row;
      for (int64_t k = gates; !in_place && k < gates_depth; ++k) {
        scratch.fed[0][at * gates_depth + k] = scratch.fed[1][at * gates_depth + k] = Left{};
      }
      for (int64_t j = 0; j < state_stride; j += kWidth) {
        store(scratch.dh + at * state_stride + j, upto(dh, b * p.output_size, j, p.output_size));
      }
      if (lstm) {
        for (int64_t j = 0; j < unit_stride; j += kWidth) {
          store(scratch.dc + at * unit_stride + j, upto(dc, b * p.hidden_size, j, p.hidden_size));
        }
      }
    }
  }

  // dh of the states before step s + 1, for outputs of block j: dG W_hh, and what passed the product by.
  FASTGEN_MEMBER void return_block(const Work& work, const Scratch& scratch, int64_t s, int64_t j) const {
    const int64_t rows = rows_at(work, s + 1), t = rows == 0 ? 0 : time_of(p, s + 1);
    const Left* left[kGroupRows];
    for (int64_t n = 0; n < rows; n += kGroupRows) {
      const int64_t count = rows - n < kGroupRows ? rows - n : kGroupRows;
      for (int64_t r = 0; r < count; ++r) {
        if (in_place) {
          left[r] = static_cast<const Left*>(p.grad_gates) + row_number(p, t, work.first_row + n + r) * gate_stride;
        } else {
          left[r] = scratch.fed[(s + 1) & 1] + (n + r) * gates_depth;
        }
      }
      T* to = scratch.dh + n * state_stride + j * kColumns;
      multiply_panel<A, kFlatVectors>(count, left, w_hh + j * gates_depth * kColumns, gates_depth, nullptr, 0, to,
                                      state_stride, true);
      if (!has_direct() && p.h_mask == nullptr) continue;
      for (int64_t r = 0; r < count; ++r) {
        for (int v = 0; v < kFlatVectors; ++v) {
          const int64_t at = r * state_stride + v * kWidth, column = j * kColumns + v * kWidth;
          F value, direct;
          load(to + at, value);
          if (p.h_mask != nullptr) {
            const auto* mask = static_cast<const Storage*>(p.h_mask);
            value = value * upto(mask, (work.first_row + n + r) * p.output_size, column, p.output_size);
          }
          if (has_direct()) {
            load(scratch.direct + (n + r) * state_stride + column, direct);
            value = value + direct;
          }
          store(to + at, value);
        }
      }
    }
  }

  // With a projection, and for the initial states: the products of step s + 1, and d h of step s behind the projection.
  void give_back(const Work& work, const Scratch& scratch) const {
    const int64_t s = work.first_step, rows = rows_at(work, s), t = rows == 0 ? 0 : time_of(p, s);
    for (int64_t j = work.first_block; j < work.end_block; ++j) {
      return_block(work, scratch, s, j);
      if (rows_form) continue;  // take_rows has the rest
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t row = row_number(p, t, work.first_row + n);
        for (int v = 0; v < kFlatVectors; ++v) {
          const int64_t column = j * kColumns + v * kWidth;
          const F dh = dh_at(work, scratch, t, n, column);
          store(scratch.outer + n * state_stride + column, dh);
          if (p.grad_hidden != nullptr && column < p.output_size) {
            put(static_cast<Storage*>(p.grad_hidden) + row * p.output_size + column, dh,
                lanes_from(column, p.output_size));
          }
        }
      }
    }
  }

  // d h of a step: what reaches it from later steps, and the gradient of the output.
  FASTGEN_MEMBER F dh_at(const Work& work, const Scratch& scratch, int64_t t, int64_t n, int64_t column) const {
    F dh;
    load(scratch.dh + n * state_stride + column, dh);
    if (p.grad_output == nullptr || column >= p.output_size) return dh;
    const int64_t b = work.first_row + n;
    return dh + upto(static_cast<const Storage*>(p.grad_output), gradient_offset(t, b), column, p.output_size);
  }
  FASTGEN_MEMBER int64_t gradient_offset(int64_t t, int64_t b) const {
    return (p.step_rows == nullptr ? t * p.grad_step : p.step_rows[t] * p.grad_batch) + b * p.grad_batch;
  }

  // By rows: of rows [first_block, end_block) of a step, what reaches h before zoneout, in dh, and the h before past
  // the product, in direct; with a projection also where that finds it.
  void take_rows(const Work& work, const Scratch& scratch) const {
    const int64_t s = work.first_step, rows = rows_at(work, s), t = rows == 0 ? 0 : time_of(p, s);
    const int64_t of_c = lstm ? p.rows * p.hidden_size : 0;  // elements of the draws of c
    for (int64_t n = work.first_block; n < work.end_block && n < rows; ++n) {
      const int64_t row = row_number(p, t, work.first_row + n);
      T* keep = scratch.keep + n * keep_stride();
      if (p.zoneout_h > 0) zones(p, p.zoneout_h, uint64_t(of_c + row * p.output_size), p.output_size, keep);
      for (int64_t j = 0; j < p.output_size; j += kWidth) {
        F dh = dh_at(work, scratch, t, n, j);
        if (p.zoneout_h > 0) {
          F d;
          load(keep + j, d);
          store(scratch.direct + n * state_stride + j, d * dh);
          dh = (F(T(1)) - d) * dh;
        }
        store(scratch.dh + n * state_stride + j, dh);
        if (p.w_hr == nullptr) continue;
        store(scratch.outer + n * state_stride + j, dh);
        if (p.grad_hidden != nullptr) {
          put(static_cast<Storage*>(p.grad_hidden) + row * p.output_size + j, dh, lanes_from(j, p.output_size));
        }
      }
    }
  }

  // By rows: the cells of rows [first_block, end_block) of a step.
  void cells(const Work& work, const Scratch& scratch) const {
    if (p.w_hr == nullptr) take_rows(work, scratch);
    switch (p.mode) {
      case CellMode::kLstm: return lstm_cells(work, scratch);
      case CellMode::kGru: return cells_of<CellMode::kGru>(work, scratch);
      case CellMode::kTanh: return cells_of<CellMode::kTanh>(work, scratch);
      case CellMode::kRelu: return cells_of<CellMode::kRelu>(work, scratch);
    }
  }

  void lstm_cells(const Work& work, const Scratch& scratch) const {
    const int64_t s = work.first_step, rows = rows_at(work, s), t = rows == 0 ? 0 : time_of(p, s);
    const LstmRowBackward<Storage> row_cell{p, unit_stride};
    for (int64_t n = work.first_block; n < work.end_block && n < rows; ++n) {
      const int64_t b = work.first_row + n, row = row_number(p, t, b), before = row_before(s, b);
      T* c = scratch.temporary + n * kTemporaries * unit_stride;
      for (int64_t j = 0; j < p.hidden_size; j += kWidth) {
        const int count = lanes_from(j, p.hidden_size);
        store(c + j, before < 0 ? take<F>(static_cast<const Storage*>(p.c_0) + b * p.hidden_size + j, count)
                                : take<F>(static_cast<const T*>(p.cells) + before * cell_stride + j, count));
      }
      T* keep = p.zoneout_c > 0 ? scratch.keep + n * keep_stride() : nullptr;
      if (keep != nullptr) zones(p, p.zoneout_c, uint64_t(row * p.hidden_size), p.hidden_size, keep);
      Left* fed = in_place ? nullptr : scratch.fed[s & 1] + n * gates_depth;
      row_cell.run(row, c, p.w_hr != nullptr ? scratch.to_raw + n * unit_stride : scratch.dh + n * state_stride,
                   scratch.dc + n * unit_stride, keep, c + unit_stride, fed);
    }
  }

  template <CellMode kMode>
  void cells_of(const Work& work, const Scratch& scratch) const {
    const int64_t s = work.first_step, rows = rows_at(work, s);
    for (int64_t n = work.first_block; n < work.end_block && n < rows; ++n) {
      for (int64_t j = 0; j < p.hidden_size; j += kWidth) {
        F dh, past, direct;
        T* to = scratch.direct + n * state_stride + j;
        load(scratch.dh + n * state_stride + j, dh);
        load(to, past);
        cell<kMode>(work, scratch, s, n, j, dh);
        if (!gru) continue;
        load(to, direct);
        store(to, direct + past);
      }
    }
  }

  void step(const Work& work, const Scratch& scratch) const {
    switch (p.mode) {
      case CellMode::kLstm: return step_of<CellMode::kLstm>(work, scratch);
      case CellMode::kGru: return step_of<CellMode::kGru>(work, scratch);
      case CellMode::kTanh: return step_of<CellMode::kTanh>(work, scratch);
      case CellMode::kRelu: return step_of<CellMode::kRelu>(work, scratch);
    }
  }

  template <CellMode kMode>
  __attribute__((noinline)) void step_of(const Work& work, const Scratch& scratch) const {
    const int64_t s = work.first_step, rows = rows_at(work, s), t = time_of(p, s);
    alignas(64) T sums[kGroupRows * kColumns];
    const Left* left[kGroupRows];
    for (int64_t i = work.first_block; i < work.end_block; ++i) {
      // Back and forth: the panels that the last step used last are still in cache.
      const int64_t j = s % 2 == 0 ? i : work.first_block + work.end_block - 1 - i;
      if (p.w_hr == nullptr) {
        for (int64_t n = 0; n < rows; ++n) expect<kMode>(work, s, n, j * kColumns);
        return_block(work, scratch, s, j);
        for (int64_t n = 0; n < rows; ++n) {
          for (int v = 0; v < kFlatVectors; ++v) {
            const int64_t unit = j * kColumns + v * kWidth;
            if (unit >= p.hidden_size) break;
            cell<kMode>(work, scratch, s, n, unit, dh_at(work, scratch, t, n, unit));
          }
        }
        continue;
      }
      for (int64_t n = 0; n < rows; n += kGroupRows) {
        const int64_t count = rows - n < kGroupRows ? rows - n : kGroupRows;
        for (int64_t r = 0; r < count; ++r) left[r] = scratch.outer + (n + r) * state_stride;
        multiply_panel<A, kFlatVectors>(count, left, w_hr + j * state_depth * kColumns, state_depth, nullptr, 0, sums,
                                        kColumns);
        for (int64_t r = 0; r < count; ++r) {
          for (int v = 0; v < kFlatVectors; ++v) {
            const int64_t unit = j * kColumns + v * kWidth;
            if (unit >= p.hidden_size) break;
            F dh;
            load(sums + r * kColumns + v * kWidth, dh);
            if (rows_form) {
              store(scratch.to_raw + (n + r) * unit_stride + unit, dh);
            } else {
              cell<kMode>(work, scratch, s, n + r, unit, dh);
            }
          }
        }
      }
    }
  }

  // Asks for what the cells of a panel of units are going to read and write.
  template <CellMode kMode>
  FASTGEN_MEMBER void expect(const Work& work, int64_t s, int64_t n, int64_t unit) const {
    const int64_t t = time_of(p, s), b = work.first_row + n, row = row_number(p, t, b);
    const int64_t units = p.hidden_size - unit < kColumns ? p.hidden_size - unit : kColumns;
    if constexpr (Gates<kMode>::kCount > 1) {
      const Storage* saved = static_cast<const Storage*>(p.gates) + row * 4 * p.hidden_size + unit;
      for (int g = 0; g < 4; ++g) ask(saved + g * p.hidden_size, units);
    }
    if constexpr (kMode == CellMode::kLstm) {
      const int64_t before = row_before(s, b);
      if (before >= 0) ask(static_cast<const T*>(p.cells) + before * p.hidden_size + unit, units);
    } else {
      ask(static_cast<const Storage*>(p.output) + row * p.output_size + unit, units);
    }
    if (p.grad_output != nullptr) ask(static_cast<const Storage*>(p.grad_output) + gradient_offset(t, b) + unit, units);
    Storage* out = static_cast<Storage*>(p.grad_gates) + row * gate_stride + unit;
    for (int g = 0; g < gate_gradients(p); ++g) ask<true>(out + g * p.hidden_size, units);
  }

  // dG of a vector of units, and what reaches c and h of the step before.
  template <CellMode kMode>
  FASTGEN_MEMBER void cell(const Work& work, const Scratch& scratch, int64_t s, int64_t n, int64_t unit, F dh) const {
    const int64_t t = time_of(p, s), b = work.first_row + n, row = row_number(p, t, b);
    const int count = lanes_from(unit, p.hidden_size);
    constexpr bool kGru = kMode == CellMode::kGru;
    constexpr int kGates = Gates<kMode>::kCount, kGradients = kGru ? 4 : kGates;
    const F one(T(1));
    F gradient[kGradients];
    if constexpr (kMode == CellMode::kLstm) {
      const Storage* saved = static_cast<const Storage*>(p.gates) + row * 4 * p.hidden_size + unit;
      const F i = take<F>(saved, count), f = take<F>(saved + p.hidden_size, count),
              g = take<F>(saved + 2 * p.hidden_size, count), o = take<F>(saved + 3 * p.hidden_size, count);
      const T* cells = static_cast<const T*>(p.cells);
      const F c = take<F>(cells + row * p.hidden_size + unit, count);
      const int64_t before = row_before(s, b);
      const F c_before = before < 0 ? take<F>(static_cast<const Storage*>(p.c_0) + b * p.hidden_size + unit, count)
                                    : take<F>(cells + before * p.hidden_size + unit, count);
      const F y = hyperbolic_tangent<T, U>(c);
      F dc;
      load(scratch.dc + n * unit_stride + unit, dc);
      dc = multiply_add(dh * o, one - y * y, dc);
      store(scratch.dc + n * unit_stride + unit, dc * f);
      gradient[0] = dc * g * i * (one - i);
      gradient[1] = dc * c_before * f * (one - f);
      gradient[2] = dc * i * (one - g * g);
      gradient[3] = dh * y * o * (one - o);
      if (p.hidden != nullptr) put(static_cast<Storage*>(p.hidden) + row * p.hidden_size + unit, o * y, count);
    } else if constexpr (kGru) {
      const Storage* saved = static_cast<const Storage*>(p.gates) + row * 4 * p.hidden_size + unit;
      const F r = take<F>(saved, count), z = take<F>(saved + p.hidden_size, count),
              y = take<F>(saved + 2 * p.hidden_size, count), from_h = take<F>(saved + 3 * p.hidden_size, count);
      const int64_t before = row_before(s, b);
      const Storage* h = before < 0 ? static_cast<const Storage*>(p.h_0) + b * p.output_size
                                    : static_cast<const Storage*>(p.output) + before * p.output_size;
      const F dn = dh * (one - z) * (one - y * y);
      gradient[0] = dn * from_h * r * (one - r);
      gradient[1] = dh * (take<F>(h + unit, count) - y) * z * (one - z);
      gradient[2] = dn * r;
      gradient[3] = dn;
      store(scratch.direct + n * state_stride + unit, dh * z);
    } else {
      // With zoneout, h before it.
      const void* from = p.zoneout_h > 0 ? p.gates : p.output;
      const F h = take<F>(static_cast<const Storage*>(from) + row * p.output_size + unit, count);
      gradient[0] = kMode == CellMode::kTanh ? dh * (one - h * h) : select(less(F(T(0)), h), dh, F(T(0)));
    }
    Storage* out = static_cast<Storage*>(p.grad_gates) + row * gate_stride + unit;
    FASTGEN_UNROLL
    for (int k = 0; k < kGradients; ++k) put(out + k * p.hidden_size, gradient[k], count);
    if (!in_place) {
      Left* fed = scratch.fed[s & 1] + n * gates_depth + unit;
      FASTGEN_UNROLL
      for (int k = 0; k < kGates; ++k) put(fed + k * p.hidden_size, gradient[k], count);
    }
  }

  void finish(const Work& work, const Scratch& scratch) const {
    for (int64_t b = work.first_row; b < work.end_row; ++b) {
      const int64_t n = b - work.first_row;
      F value;
      for (int64_t j = 0; p.grad_h_0 != nullptr && j < p.output_size; j += kWidth) {
        load(scratch.dh + n * state_stride + j, value);
        put(static_cast<Storage*>(p.grad_h_0) + b * p.output_size + j, value, lanes_from(j, p.output_size));
      }
      for (int64_t j = 0; p.grad_c_0 != nullptr && j < p.hidden_size; j += kWidth) {
        load(scratch.dc + n * unit_stride + j, value);
        put(static_cast<Storage*>(p.grad_c_0) + b * p.hidden_size + j, value, lanes_from(j, p.hidden_size));
      }
    }
  }

  // Number of the row that step s of row b of the batch follows; -1 where it begins with h_0.
  FASTGEN_MEMBER int64_t row_before(int64_t s, int64_t b) const {
    if (s == 0) return -1;
    const int64_t t = time_of(p, s - 1);
    return b < active_rows(p, t) ? row_number(p, t, b) : -1;
  }

  // Where the right sides of the weights' gradients stand, for the steps of the work.
  void point(const Work& work) const {
    for (int64_t s = work.first_step; s < work.end_step; ++s) {
      const int64_t t = time_of(p, s), active = active_rows(p, t);
      for (int64_t b = 0; b < active; ++b) {
        const int64_t row = row_number(p, t, b), before = row_before(s, b);
        p.input_rows[row] = static_cast<const Storage*>(p.input) + input_offset(p, t, b);
        p.state_rows[row] = before < 0 ? static_cast<const Storage*>(p.h_0) + b * p.output_size
                                       : static_cast<const Storage*>(p.output) + before * p.output_size;
        if (p.h_mask != nullptr) {
          p.mask_rows[row] = static_cast<const Storage*>(p.h_mask) + b * p.output_size;
        }
      }
    }
  }

  // Asks for elements that will be read, or written, some microseconds from now: as near as L2.
  template <bool kWrite = false, class Element>
  static FASTGEN_MEMBER void ask(const Element* from, int64_t count) {
    constexpr int kToL2 = 2;
    for (int64_t i = 0; i < count * int64_t(sizeof *from); i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(from) + i, kWrite, kToL2);
    }
  }

  // dX, for rows [first_row, end_row) of all.
  void to_input(const Work& work) const {
    const InputScratch scratch(*this, work.scratch);
    for (int64_t first = work.first_row; first < work.end_row; first += kRowsOfInput) {
      const int64_t rows = work.end_row - first < kRowsOfInput ? work.end_row - first : kRowsOfInput;
      const Left* left[kRowsOfInput];
      // The gates of the input's side: the first `own` of the state's, and its own.
      const int64_t shared = own < gates ? own : gates;
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t row = (first + n) * gate_stride;
        if (in_place) {
          left[n] = static_cast<const Left*>(p.grad_gates) + row + (shared > 0 ? 0 : apart);
        } else {
          const Storage* from = static_cast<const Storage*>(p.grad_gates) + row;
          Left* copy = scratch.copy + n * gates_depth;
          left[n] = copy;
          A::copy_row(from, shared, copy);
          A::copy_row(from + shared + apart, gates - shared, copy + shared);
        }
      }
      // Read by tiles of a few rows, dG would come from memory a line of each row at a time.
      for (int64_t n = 0; in_place && n < rows; ++n) {
        ask(static_cast<const Storage*>(p.grad_gates) + (first + n) * gate_stride, gate_stride);
      }
      const int64_t split = in_place && shared > 0 && shared < gates ? shared : gates_depth;
      multiply_input(left, rows, 0, split, scratch.sums);
      if (split < gates_depth) {
        for (int64_t n = 0; n < rows; ++n) left[n] += split + apart;
        multiply_input(left, rows, split, gates_depth, scratch.sums);
      }
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t j = 0; j < p.input_size; j += kWidth) {
          F value;
          load(scratch.sums + n * input_stride + j, value);
          put(static_cast<Storage*>(p.grad_input) + (first + n) * p.input_size + j, value, lanes_from(j, p.input_size));
        }
      }
    }
  }

  // The products of gates [begin, end), added to what the gates before them gave.
  void multiply_input(const Left* const* left, int64_t rows, int64_t begin, int64_t end, T* sums) const {
    for (int64_t j = 0; j < input_blocks; ++j) {
      T* out = sums + j * kColumns;
      multiply_panel<A, kFlatVectors>(rows, left, w_ih + (j * gates_depth + begin) * kColumns, end - begin,
                                      begin == 0 ? nullptr : out, input_stride, out, input_stride, true);
    }
  }

  // Gradients of rows [first_block, end_block) of the weights: of W_ih and W_hh, or, past those, of W_hr.
  void to_weights(const Work& work) const {
    const auto* dg = static_cast<const Storage*>(p.grad_gates);
    const int64_t begin = work.first_block < gates ? work.first_block : gates;
    const int64_t end = work.end_block < gates ? work.end_block : gates;
    const int64_t middle = own < begin ? begin : own < end ? own : end;
    using Product = TransposedProduct<A>;
    using Target = typename Product::template Target<PointedRows<Storage>>;
    // W_ih and W_hh from row `first` on, where they have the same gates on their left.
    const auto multiply = [&](const Storage* left, int64_t first, int64_t rows, bool ih, bool hh) {
      Target targets[2];
      int count = 0;
      if (ih && p.grad_w_ih != nullptr) {
        targets[count++] = {
            {p.input_rows, nullptr}, p.input_size, static_cast<T*>(p.grad_w_ih) + first * p.input_size, p.input_size};
      }
      if (hh && p.grad_w_hh != nullptr) {
        targets[count++] = {{p.state_rows, p.h_mask == nullptr ? nullptr : p.mask_rows},
                            p.output_size,
                            static_cast<T*>(p.grad_w_hh) + first * p.output_size,
                            p.output_size};
      }
      if (count > 0) Product::run(left, gate_stride, p.rows, rows, targets, count, work.scratch);
    };
    multiply(dg + begin, begin, middle - begin, true, true);
    multiply(dg + middle + apart, middle, end - middle, true, false);
    multiply(dg + middle, middle, end - middle, false, true);
    T* b_ih = static_cast<T*>(p.grad_b_ih);
    T* b_hh = static_cast<T*>(p.grad_b_hh);
    if (norm) {
      const auto from = [](void* to, int64_t first) { return to == nullptr ? nullptr : static_cast<T*>(to) + first; };
      const Storage *to_sums = dg + 2 * gates, *behind = dg + 12 * p.hidden_size, *hats = gates_of(4);
      add_up(to_sums + begin, end - begin, from(b_ih, begin), from(b_hh, begin));
      add_up(to_sums + begin, end - begin, from(p.grad_norm_ih, begin), nullptr, hats + begin, 12 * p.hidden_size);
      add_up(to_sums + begin, end - begin, from(p.grad_norm_hh, begin), nullptr, hats + gates + begin,
             12 * p.hidden_size);
      const int64_t units = begin < p.hidden_size ? (end < p.hidden_size ? end : p.hidden_size) - begin : 0;
      add_up(behind + begin, units, from(p.grad_norm_c_bias, begin), nullptr);
      add_up(behind + begin, units, from(p.grad_norm_c, begin), nullptr, behind + p.hidden_size + begin, gate_stride);
    } else {
      add_up(dg + begin, middle - begin, b_ih == nullptr ? nullptr : b_ih + begin,
             b_hh == nullptr ? nullptr : b_hh + begin);
      if (b_ih != nullptr) add_up(dg + middle + apart, end - middle, b_ih + middle, nullptr);
      if (b_hh != nullptr) add_up(dg + middle, end - middle, b_hh + middle, nullptr);
    }
    if (p.grad_w_hr != nullptr && work.end_block > gates) {
      const int64_t first = (work.first_block > gates ? work.first_block : gates) - gates;
      const int64_t columns = p.hidden_size;
      const typename Product::template Target<MatrixRows<Storage>> target{
          {p.hidden, columns}, columns, static_cast<T*>(p.grad_w_hr) + first * columns, columns};
      Product::run(static_cast<const Storage*>(p.grad_hidden) + first, p.output_size, p.rows,
                   work.end_block - gates - first, &target, 1, work.scratch);
    }
  }

  FASTGEN_MEMBER const Storage* gates_of(int64_t gate) const {
    return static_cast<const Storage*>(p.gates) + gate * p.hidden_size;
  }

  // out[m] and copy[m] = sum over the rows of dG, each times a row of `factors` where there are any, in blocks as the
  // products of the weights.
  void add_up(const Storage* from, int64_t columns, T* out, T* copy, const Storage* factors = nullptr,
              int64_t factor_stride = 0) const {
    if (out == nullptr && copy == nullptr) return;
    constexpr int kTogether = 4;  // vectors: neighbours in memory, each with a chain of its own
    for (int64_t m = 0; m < columns; m += kTogether * kWidth) {
      const int64_t left = columns - m;
      F total[kTogether];
      for (int v = 0; v < kTogether; ++v) total[v] = F(T(0));
      for (int64_t k = 0; k < p.rows; k += kDepthBlock) {
        F block[kTogether];
        for (int v = 0; v < kTogether; ++v) block[v] = F(T(0));
        const int64_t end = p.rows - k < kDepthBlock ? p.rows : k + kDepthBlock;
        for (int64_t q = k; q < end; ++q) {
          FASTGEN_UNROLL
          for (int v = 0; v < kTogether; ++v) {
            F value = upto(from + q * gate_stride + m, 0, v * kWidth, left);
            if (factors != nullptr) value = value * upto(factors + q * factor_stride + m, 0, v * kWidth, left);
            block[v] = block[v] + value;
          }
        }
        for (int v = 0; v < kTogether; ++v) total[v] = total[v] + block[v];
      }
      for (int v = 0; v < kTogether && v * kWidth < left; ++v) {
        const int64_t at = m + v * kWidth;
        if (out != nullptr) put(out + at, total[v], lanes_from(at, columns));
        if (copy != nullptr) put(copy + at, total[v], lanes_from(at, columns));
      }
    }
  }

  static FASTGEN_MEMBER int lanes_from(int64_t first, int64_t size) {
    return size - first < kWidth ? int(size - first) : kWidth;
  }
  // Columns [j, j + lanes) of the row that begins at `at`; zero past its end, or where there is no matrix.
  static FASTGEN_MEMBER F upto(const Storage* matrix, int64_t at, int64_t j, int64_t size) {
    return matrix != nullptr && j < size ? take<F>(matrix + at + j, lanes_from(j, size)) : F(T(0));
  }

  const RecurrentBackwardParams& p;
  const bool lstm, gru, norm, rows_form;
  const bool in_place;               // whether dG enters the products as it is stored
  const int64_t gates, gate_stride;  // G H, and elements of a row of grad_gates
  const int64_t cell_stride;         // of a row of cells
  const int64_t own, apart;  // from gate `own` on, the input's side stands `apart` behind the state's in grad_gates
  const int64_t gates_depth, state_depth;                 // rounded up to whole steps of the product
  const int64_t state_stride, unit_stride, input_stride;  // rounded up to whole panels
  const int64_t blocks, projection_blocks, input_blocks;
  Right *w_hh, *w_hr, *w_ih;
  int64_t packed_bytes;
};

// Calls body(kernel) with the kernel for the params' direction and mode, of a storage type and an arithmetic.
template <Form kForm, class Storage, class A, class Body>
FASTGEN_FN void with_mode_in(const RecurrentParams& p, const Body& body) {
  switch (p.mode) {
    case CellMode::kLstm: return body(Recurrence<CellMode::kLstm, Storage, A, kForm>(p));
    case CellMode::kGru: return body(Recurrence<CellMode::kGru, Storage, A, kForm>(p));
    default: return body(Recurrence<CellMode::kTanh, Storage, A, kForm>(p));
  }
}
template <class Storage, class A, class Body>
FASTGEN_FN void with_mode(const RecurrentParams& p, const Body& body) {
  return by_rows(p) ? with_mode_in<Form::kRows, Storage, A>(p, body) : with_mode_in<Form::kTiles, Storage, A>(p, body);
}
template <class Storage, class A, class Body>
FASTGEN_FN void with_mode(const RecurrentBackwardParams& p, const Body& body) {
  body(RecurrenceBackward<Storage, A>(p));
}
}  // namespace
}  // namespace fastgen
