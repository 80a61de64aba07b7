// LSTM, GRU and Elman RNN over a sequence, written once over Isa (after product.inl).
//
// The product of all inputs of some steps is taken at once, just before the recurrence wants it, so that it stays in
// cache. The recurrent weights are packed once; in a panel stand all gates of a block of units,
//   [block][depth][gate][lanes]
// so that the tile that leaves the product is all that a cell needs: bias, activations, states and stores follow
// on it at once. A cell that needs whole rows (Form::kRows: layer norm, zoneout) finds them in scratch, and a pass over
// the rows of a step follows its product; see cell_rows.inl. All of it runs in the work type; the states between the
// steps are never rounded to a half type, except where the product itself takes bf16.
#pragma once

#include "cell_rows.inl"
#include "product.inl"

namespace fastgen {
namespace {

// How a cell's gates lie in a panel. kTanh stands for both kinds of RNN.
template <CellMode kMode>
struct Gates {
  static constexpr int kCount = kMode == CellMode::kLstm ? 4 : kMode == CellMode::kGru ? 3 : 1;
  static constexpr int kVectors = kMode == CellMode::kGru ? 3 : 4;  // of a panel's row
  static constexpr int kUnitVectors = kVectors / kCount;            // of units, each gate
};

// What a cell follows on: a tile of sums, as it leaves the product, or the sums of whole rows.
enum class Form { kTiles, kRows };

constexpr int64_t kChunkBytes = 1 << 18;  // of input products: they stay in L2 beside the recurrent weights

// Weights that do not stay in L2 have to serve this many rows of input each time they pass by.
constexpr int64_t kLargeWeights = 1 << 20;
constexpr int64_t kInputRows = 192;

constexpr int64_t kFewRows = 8;  // of a batch: its rows are not dealt out to threads

// Memory carved off one block, each piece on a line of its own; from null, it counts bytes.
class Arena {
 public:
  explicit FASTGEN_MEMBER Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  FASTGEN_MEMBER T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up<int64_t>(count * int64_t(sizeof(T)), 64);
    return piece;
  }
  FASTGEN_MEMBER int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

FASTGEN_FN int64_t active_rows(const RecurrentParams& p, int64_t t) {
  return p.batch_sizes == nullptr ? p.batch : p.batch_sizes[t];
}
FASTGEN_FN int64_t row_number(const RecurrentParams& p, int64_t t, int64_t b) {
  return p.step_rows == nullptr ? t * p.row_step + b * p.row_batch : p.step_rows[t] + b;
}
FASTGEN_FN int64_t input_offset(const RecurrentParams& p, int64_t t, int64_t b) {
  return (p.step_rows == nullptr ? t * p.input_step : p.step_rows[t] * p.input_batch) + b * p.input_batch;
}
// The step that comes s-th.
FASTGEN_FN int64_t time_of(const RecurrentParams& p, int64_t s) { return p.reverse ? p.steps - 1 - s : s; }

template <CellMode kMode, class Storage, class A, Form kForm>
class Recurrence {
  using T = typename A::T;
  using F = typename A::F;
  using U = typename fastgen::Work<T>::U;
  using Left = typename A::Left;
  using Right = typename A::Right;
  using G = Gates<kMode>;
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kVectors = G::kVectors, kColumns = kVectors * kWidth, kUnits = G::kUnitVectors * kWidth;
  static constexpr int kFlatColumns = kFlatVectors * kWidth;
  static constexpr bool kByRows = kForm == Form::kRows;
  // Without it the input is read where it stands.
  static constexpr bool kCopyInput = !(sizeof(Storage) == sizeof(Left) && A::kDepth == 1);

 public:
  explicit Recurrence(const RecurrentParams& params)
      : p(params),
        input_depth(round_up<int64_t>(p.input_size, A::kDepth)),
        state_depth(round_up<int64_t>(p.output_size, A::kDepth)),
        units_depth(round_up<int64_t>(p.hidden_size, A::kDepth)),
        state_stride(round_up<int64_t>(p.output_size, kFlatColumns)),
        unit_stride(round_up<int64_t>(p.hidden_size, kUnits)),
        blocks(unit_stride / kUnits),
        packs_input(p.batch >= kFewRows || chunk_steps(p.batch) < p.steps),
        projection_blocks(p.w_hr == nullptr ? 0 : state_stride / kFlatColumns) {
    Arena arena(p.packed);
    w_ih = arena.take<Right>(packs_input ? blocks * input_depth * kColumns : 0);
    w_hh = arena.take<Right>(blocks * state_depth * kColumns);
    w_hr = arena.take<Right>(projection_blocks * units_depth * kFlatColumns);
    bias = arena.take<T>(blocks * kColumns);
    bias_hn = arena.take<T>(kMode == CellMode::kGru ? blocks * kUnits : 0);
    packed_bytes = arena.used();
  }

  RecurrentSizes sizes(int64_t rows) const {
    RecurrentSizes sizes;
    sizes.blocks = blocks;
    sizes.projection_blocks = projection_blocks;
    sizes.packed = packed_bytes;
    sizes.chunk = chunk_steps(rows);
    sizes.scratch = Scratch(*this, nullptr, rows).bytes;
    return sizes;
  }

  void run(const RecurrentWork& work) const {
    if (work.phase == RecurrentPhase::kPack) {
      for (int64_t i = work.first_block; i < work.end_block; ++i) pack(i);
      return;
    }
    const Scratch scratch(*this, work.scratch, work.end_row - work.first_row);
    if constexpr (kByRows) {
      if (work.phase == RecurrentPhase::kCells) return cells(work, scratch);
      if (work.phase == RecurrentPhase::kEmit) return emit_rows(work, scratch);
    }
    switch (work.phase) {
      case RecurrentPhase::kRows: return rows(work, scratch);
      case RecurrentPhase::kStart: return start(work, scratch);
      case RecurrentPhase::kGather: return gather(work, scratch);
      case RecurrentPhase::kInput: return multiply_input(work, scratch);
      case RecurrentPhase::kStep: return step(work, scratch);
      case RecurrentPhase::kProject: return project(work, scratch);
      default: return finish(work, scratch);
    }
  }

 private:
  // State of some rows of the batch, and the inputs of a chunk of steps.
  struct Scratch {
    Left* fed[2];   // [rows][state_stride]: the h that the product takes, of the last step and of this one
    T* h;           // the same unmasked and unrounded, where that is not fed[] itself
    T* c;           // [rows][unit_stride]
    Left* raw;      // [rows][unit_stride]: the h before the projection
    T* from_input;  // [blocks][chunk_rows][kColumns], by rows [chunk_rows][blocks][kColumns]: bias + W_ih x
    // By rows only:
    T* from_state;     // [rows][blocks][kColumns]: W_hh h
    T* proposed;       // [rows][state_stride]: h before zoneout
    T* keep;           // [rows][state_stride or unit_stride]: d of zoneout
    Left* input_copy;  // [chunk rows][input_depth]
    const Left** input_rows;
    int64_t* step_start;  // [chunk]: where in the chunk a step's rows begin
    int64_t chunk_rows, bytes;

    FASTGEN_MEMBER Scratch(const Recurrence& of, void* base, int64_t rows) {
      const int64_t steps = of.chunk_steps(rows);
      chunk_rows = steps * rows;
      Arena arena(base);
      fed[0] = arena.take<Left>(rows * of.state_stride);
      fed[1] = arena.take<Left>(rows * of.state_stride);
      h = of.keeps_h() ? arena.take<T>(rows * of.state_stride) : nullptr;
      c = arena.take<T>(kMode == CellMode::kLstm ? rows * of.unit_stride : 0);
      raw = arena.take<Left>(of.p.w_hr != nullptr ? rows * of.unit_stride : 0);
      from_input = arena.take<T>(chunk_rows * of.blocks * kColumns);
      if constexpr (kByRows) {
        from_state = arena.take<T>(rows * of.blocks * kColumns);
        proposed = arena.take<T>(rows * of.state_stride);
        keep = arena.take<T>(rows * of.keep_stride());
      }
      input_copy = arena.take<Left>(kCopyInput ? chunk_rows * of.input_depth : 0);
      input_rows = arena.take<const Left*>(chunk_rows);
      step_start = arena.take<int64_t>(steps + 1);
      bytes = arena.used();
    }
  };

  bool keeps_h() const { return kByRows || p.h_mask != nullptr || sizeof(Left) != sizeof(T); }
  int64_t keep_stride() const { return state_stride > unit_stride ? state_stride : unit_stride; }

  // The sums of block u of row n, of `rows` rows, and the way to the next row.
  FASTGEN_MEMBER T* sums_at(T* sums, int64_t rows, int64_t u, int64_t n) const {
    return sums + (kByRows ? n * blocks + u : u * rows + n) * kColumns;
  }
  FASTGEN_MEMBER int64_t sums_stride() const { return kByRows ? blocks * kColumns : kColumns; }

  int64_t chunk_steps(int64_t rows) const {
    const int64_t row = blocks * kColumns * int64_t(sizeof(T));
    const int64_t weights = blocks * kColumns * input_depth * int64_t(sizeof(Right));
    const int64_t enough = weights > kLargeWeights ? kInputRows : 2 * kTileRows<kVectors>;
    const int64_t fitting = kChunkBytes / row;
    const int64_t wanted = (fitting < enough ? enough : fitting) / (rows < 1 ? 1 : rows);
    return wanted < 1 ? 1 : wanted < p.steps ? wanted : p.steps;
  }

  // Panels, and biases added up: all of a cell's but W_hn's, which r multiplies.
  void pack(int64_t i) const {
    const auto* from_ih = static_cast<const Storage*>(p.w_ih);
    const auto* from_hh = static_cast<const Storage*>(p.w_hh);
    const auto* from_hr = static_cast<const Storage*>(p.w_hr);
    if (i >= blocks) {
      i -= blocks;
      for (int v = 0; v < kFlatVectors; ++v) {
        const Storage* rows[kWidth];
        for (int lane = 0; lane < kWidth; ++lane) {
          const int64_t output = i * kFlatColumns + v * kWidth + lane;
          rows[lane] = output < p.output_size ? from_hr + output * p.hidden_size : nullptr;
        }
        A::pack(rows, p.hidden_size, kFlatColumns, w_hr + i * units_depth * kFlatColumns + v * kWidth * A::kDepth);
      }
      return;
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int lane = 0; lane < kWidth; ++lane) {
        const int64_t row = weight_row(i, v, lane);
        const T from_x = row >= 0 && p.b_ih != nullptr ? widen(static_cast<const Storage*>(p.b_ih)[row]) : T(0);
        const T from_h = row >= 0 && p.b_hh != nullptr ? widen(static_cast<const Storage*>(p.b_hh)[row]) : T(0);
        const bool apart = kMode == CellMode::kGru && v == 2;
        bias[i * kColumns + v * kWidth + lane] = apart ? from_x : from_x + from_h;
        if (apart) bias_hn[i * kUnits + lane] = from_h;
      }
    }
    pack_gates(from_hh, p.output_size, i, 0, p.output_size, w_hh + i * state_depth * kColumns);
    if (packs_input) pack_gates(from_ih, p.input_size, i, 0, p.input_size, w_ih + i * input_depth * kColumns);
  }

  // Row of the weights that a lane of a panel's vector has; -1 past the last unit.
  FASTGEN_MEMBER int64_t weight_row(int64_t block, int v, int lane) const {
    const int64_t unit = block * kUnits + v % G::kUnitVectors * kWidth + lane;
    return unit < p.hidden_size ? v / G::kUnitVectors * p.hidden_size + unit : -1;
  }

  // The panel of a block of units, of columns [k, k + depth) of a matrix of weights.
  void pack_gates(const Storage* matrix, int64_t columns, int64_t block, int64_t k, int64_t depth, Right* out) const {
    for (int v = 0; v < kVectors; ++v) {
      const Storage* rows[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) {
        const int64_t row = weight_row(block, v, lane);
        rows[lane] = row >= 0 ? matrix + row * columns + k : nullptr;
      }
      A::pack(rows, depth, kColumns, out + v * kWidth * A::kDepth);
    }
  }

  void rows(const RecurrentWork& all, const Scratch& scratch) const {
    RecurrentWork work = all;
    work.first_block = 0;
    work.end_block = blocks;
    RecurrentWork projection = work;
    projection.end_block = projection_blocks;
    start(work, scratch);
    const int64_t chunk = chunk_steps(work.end_row - work.first_row);
    for (int64_t s = 0; s < p.steps; s += chunk) {
      work.first_step = s;
      work.end_step = s + chunk < p.steps ? s + chunk : p.steps;
      gather(work, scratch);
      multiply_input(work, scratch);
      for (projection.first_step = s; projection.first_step < work.end_step; ++projection.first_step) {
        RecurrentWork one = work;
        one.first_step = projection.first_step;
        step(one, scratch);
        if constexpr (kByRows) {
          one.first_block = 0;
          one.end_block = work.end_row - work.first_row;
          cells(one, scratch);
          project(projection, scratch);
          if (p.w_hr != nullptr) emit_rows(one, scratch);
        } else {
          project(projection, scratch);
        }
      }
    }
    finish(work, scratch);
  }

  // Rows of step t among those of `work`.
  FASTGEN_MEMBER int64_t rows_at(const RecurrentWork& work, int64_t t) const {
    const int64_t active = active_rows(p, t);
    const int64_t end = active < work.end_row ? active : work.end_row;
    return end > work.first_row ? end - work.first_row : 0;
  }

  // Initial states, in both halves of fed[]: a packed sequence read in reverse begins later in shorter rows.
  void start(const RecurrentWork& work, const Scratch& scratch) const {
    const auto* h_0 = static_cast<const Storage*>(p.h_0);
    const auto* c_0 = static_cast<const Storage*>(p.c_0);
    for (int64_t b = work.first_row; b < work.end_row; ++b) {
      const int64_t at = b - work.first_row;
      for (int64_t j = 0; j < state_stride; j += kWidth) {
        const F h = take_upto<F>(h_0 + b * p.output_size, j, p.output_size);
        const F fed = masked(h, b, j);
        store(scratch.fed[0] + at * state_stride + j, fed);
        store(scratch.fed[1] + at * state_stride + j, fed);
        if (scratch.h != nullptr) store(scratch.h + at * state_stride + j, h);
      }
      if constexpr (kMode == CellMode::kLstm) {
        for (int64_t j = 0; j < unit_stride; j += kWidth) {
          store(scratch.c + at * unit_stride + j, take_upto<F>(c_0 + b * p.hidden_size, j, p.hidden_size));
        }
      }
    }
  }

  // Rows of the input of the steps of a chunk, by pointer; widened where the product does not take them as they are.
  void gather(const RecurrentWork& work, const Scratch& scratch) const {
    const auto* input = static_cast<const Storage*>(p.input);
    int64_t n = 0;
    for (int64_t s = work.first_step; s < work.end_step; ++s) {
      const int64_t t = time_of(p, s), rows = rows_at(work, t);
      scratch.step_start[s - work.first_step] = n;
      for (int64_t b = work.first_row; b < work.first_row + rows; ++b, ++n) {
        const Storage* from = input + input_offset(p, t, b);
        if constexpr (kCopyInput) {
          Left* copy = scratch.input_copy + n * input_depth;
          A::copy_row(from, p.input_size, copy);
          scratch.input_rows[n] = copy;
        } else {
          scratch.input_rows[n] = from;
        }
      }
    }
    scratch.step_start[work.end_step - work.first_step] = n;
  }

  void multiply_input(const RecurrentWork& work, const Scratch& scratch) const {
    const int64_t count = scratch.step_start[work.end_step - work.first_step];
    for (int64_t u = work.first_block; u < work.end_block; ++u) {
      T* out = sums_at(scratch.from_input, scratch.chunk_rows, u, 0);
      const int64_t stride = sums_stride();
      const T* start = p.norm_ih == nullptr ? bias + u * kColumns : nullptr;  // the norm comes before the bias
      if (packs_input) {
        multiply_panel<A, kVectors>(count, scratch.input_rows, w_ih + u * input_depth * kColumns, input_depth, start, 0,
                                    out, stride);
        continue;
      }
      alignas(64) Right panel[kDepthBlock * kColumns];
      for (int64_t k = 0; k == 0 || k < input_depth; k += kDepthBlock) {
        const int64_t depth = input_depth - k < kDepthBlock ? input_depth - k : kDepthBlock;
        pack_gates(static_cast<const Storage*>(p.w_ih), p.input_size, u, k,
                   p.input_size - k < depth ? p.input_size - k : depth, panel);
        const Left* left[kGroupRows];
        for (int64_t n = 0; n < count; n += kGroupRows) {
          const int64_t rows = count - n < kGroupRows ? count - n : kGroupRows;
          for (int64_t r = 0; r < rows; ++r) left[r] = scratch.input_rows[n + r] + k;
          T* to = out + n * stride;
          multiply_panel<A, kVectors>(rows, left, panel, depth, k == 0 ? start : to, k == 0 ? 0 : stride, to, stride);
        }
      }
    }
  }

  // One step of the units of some blocks. work.first_step must lie in the chunk that begins at a multiple of its size.
  void step(const RecurrentWork& work, const Scratch& scratch) const {
    const int64_t s = work.first_step, t = time_of(p, s), rows = rows_at(work, t);
    const int64_t first = scratch.step_start[s % chunk_steps(work.end_row - work.first_row)];
    [[maybe_unused]] alignas(64) T sums[kGroupRows * kColumns];
    const Left* left[kGroupRows];
    for (int64_t i = work.first_block; i < work.end_block; ++i) {
      // Back and forth: the panels that the last step used last are still in cache.
      const int64_t u = s % 2 == 0 ? i : work.first_block + work.end_block - 1 - i;
      const Right* panel = w_hh + u * state_depth * kColumns;
      for (int64_t n = 0; n < rows; n += kGroupRows) {
        const int64_t count = rows - n < kGroupRows ? rows - n : kGroupRows;
        for (int64_t r = 0; r < count; ++r) left[r] = scratch.fed[s & 1] + (n + r) * state_stride;
        if constexpr (kByRows) {
          multiply_panel<A, kVectors>(count, left, panel, state_depth, nullptr, 0, sums_at(scratch.from_state, 0, u, n),
                                      sums_stride());
        } else {
          const T* from_input = sums_at(scratch.from_input, scratch.chunk_rows, u, first + n);
          const T* begin = from_input;
          if constexpr (kMode == CellMode::kGru) {
            // W_hn h + b_hn stays by itself: r multiplies it.
            F value;
            for (int64_t r = 0; r < count; ++r) {
              for (int v = 0; v < 3; ++v) {
                load(v < 2 ? from_input + r * kColumns + v * kWidth : bias_hn + u * kUnits, value);
                store(sums + r * kColumns + v * kWidth, value);
              }
            }
            begin = sums;
          }
          multiply_panel<A, kVectors>(count, left, panel, state_depth, begin, kColumns, sums, kColumns);
          for (int64_t r = 0; r < count; ++r) {
            cell(work, scratch, t, n + r, u, sums + r * kColumns, from_input + r * kColumns);
          }
          if constexpr (kMode == CellMode::kLstm) {
            for (int64_t r = 0; r < count; ++r) cell_output(work, scratch, t, n + r, u, sums + r * kColumns);
          }
        }
      }
    }
  }

  // A row's units of block u, from what the product left. An LSTM's h is left to cell_output, for which o takes the
  // place of its sum: in one pass the chain of two activations would be longer than the processor can overlap.
  FASTGEN_MEMBER void cell(const RecurrentWork& work, const Scratch& scratch, int64_t t, int64_t at, int64_t u, T* sums,
                           const T* from_input) const {
    const int64_t row = row_number(p, t, work.first_row + at);
    F x[kVectors];
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) load(sums + v * kWidth, x[v]);
    if constexpr (kMode == CellMode::kLstm) {
      const int64_t unit = u * kUnits;
      const int count = lanes_from(unit, p.hidden_size);
      T* state = scratch.c + at * unit_stride + unit;
      F c;
      load(state, c);
      const F i = sigmoid<T, U>(x[0]), f = sigmoid<T, U>(x[1]), g = hyperbolic_tangent<T, U>(x[2]),
              o = sigmoid<T, U>(x[3]);
      c = multiply_add(f, c, i * g);
      store(state, c);
      store(sums + 3 * kWidth, o);
      if (p.gates != nullptr) {
        save(row, unit, count, i, f, g, o);
        put(static_cast<T*>(p.cells) + row * p.hidden_size + unit, c, count);
      }
    } else if constexpr (kMode == CellMode::kGru) {
      const int64_t unit = u * kUnits;
      F from_x, before;
      load(from_input + 2 * kWidth, from_x);
      if (scratch.h != nullptr) {
        load(scratch.h + at * state_stride + unit, before);
      } else {
        load(scratch.fed[step_parity(t)] + at * state_stride + unit, before);
      }
      const F r = sigmoid<T, U>(x[0]), z = sigmoid<T, U>(x[1]);
      const F n = hyperbolic_tangent<T, U>(multiply_add(r, x[2], from_x));
      if (p.gates != nullptr) save(row, unit, lanes_from(unit, p.hidden_size), r, z, n, x[2]);
      emit(work, scratch, t, at, unit, multiply_add(z, before - n, n));
    } else {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const int64_t unit = u * kUnits + v * kWidth;
        if (unit >= p.hidden_size) break;
        const F h = p.mode == CellMode::kTanh ? hyperbolic_tangent<T, U>(x[v]) : larger(F(T(0)), x[v]);
        emit(work, scratch, t, at, unit, h);
      }
    }
  }

  FASTGEN_MEMBER void cell_output(const RecurrentWork& work, const Scratch& scratch, int64_t t, int64_t at, int64_t u,
                                  const T* sums) const {
    const int64_t unit = u * kUnits;
    F o, c;
    load(sums + 3 * kWidth, o);
    load(scratch.c + at * unit_stride + unit, c);
    const F h = o * hyperbolic_tangent<T, U>(c);
    if (p.w_hr != nullptr) {
      store(scratch.raw + at * unit_stride + unit, h);
    } else {
      emit(work, scratch, t, at, unit, h);
    }
  }

  // By rows: the cells of rows [first_block, end_block) of a step whose product has been taken.
  void cells(const RecurrentWork& work, const Scratch& scratch) const {
    const int64_t s = work.first_step, t = time_of(p, s), rows = rows_at(work, t);
    const int64_t first = scratch.step_start[s % chunk_steps(work.end_row - work.first_row)];
    const RowCell<kMode, Storage, PanelRow<T, kVectors / G::kUnitVectors>> row_cell{
        p, p.hidden_size, {}, p.b_ih, p.b_hh};
    for (int64_t at = work.first_block; at < work.end_block && at < rows; ++at) {
      const int64_t row = row_number(p, t, work.first_row + at);
      T* from_input = sums_at(scratch.from_input, 0, 0, first + at);
      T* from_state = sums_at(scratch.from_state, 0, 0, at);
      T* keep = p.zoneout_c > 0 ? scratch.keep + at * keep_stride() : nullptr;
      Storage* gates =
          p.gates == nullptr ? nullptr : static_cast<Storage*>(p.gates) + row * saved_gates(p) * p.hidden_size;
      T* cells = p.cells == nullptr ? nullptr : static_cast<T*>(p.cells) + row * (p.hidden_size + saved_scales(p));
      const auto propose = [&](int64_t j, F h) {
        if (p.w_hr != nullptr) {
          store(scratch.raw + at * unit_stride + j, h);
        } else {
          store(scratch.proposed + at * state_stride + j, h);
        }
      };
      if constexpr (kMode == CellMode::kLstm) {
        if (keep != nullptr) zones(p, p.zoneout_c, uint64_t(row * p.hidden_size), p.hidden_size, keep);
        row_cell.lstm(from_input, from_state, scratch.c + at * unit_stride, keep, gates, cells, propose);
      } else if constexpr (kMode == CellMode::kGru) {
        row_cell.gru(from_input, from_state, scratch.h + at * state_stride, gates, propose);
      } else {
        row_cell.elman(p.mode == CellMode::kRelu, from_input, from_state, gates, propose);
      }
    }
    if (p.w_hr == nullptr) emit_rows(work, scratch);
  }

  // By rows: h of rows [first_block, end_block) of a step, from what its cells, or the projection, proposed.
  void emit_rows(const RecurrentWork& work, const Scratch& scratch) const {
    const int64_t t = time_of(p, work.first_step), rows = rows_at(work, t);
    const int64_t before = p.c_0 == nullptr ? 0 : p.rows * p.hidden_size;  // elements of the draws of c
    for (int64_t at = work.first_block; at < work.end_block && at < rows; ++at) {
      T* keep = scratch.keep + at * keep_stride();
      if (p.zoneout_h > 0) {
        const int64_t row = row_number(p, t, work.first_row + at);
        zones(p, p.zoneout_h, uint64_t(before + row * p.output_size), p.output_size, keep);
      }
      for (int64_t j = 0; j < p.output_size; j += kWidth) {
        F h;
        load(scratch.proposed + at * state_stride + j, h);
        if (p.zoneout_h > 0) {
          F d, last;
          load(keep + j, d);
          load(scratch.h + at * state_stride + j, last);
          h = multiply_add(d, last, (F(T(1)) - d) * h);
        }
        emit(work, scratch, t, at, j, h);
      }
    }
  }

  void project(const RecurrentWork& work, const Scratch& scratch) const {
    const int64_t t = time_of(p, work.first_step), rows = rows_at(work, t);
    alignas(64) T sums[kGroupRows * kFlatColumns];
    const Left* left[kGroupRows];
    for (int64_t j = work.first_block; j < work.end_block; ++j) {
      for (int64_t n = 0; n < rows; n += kGroupRows) {
        const int64_t count = rows - n < kGroupRows ? rows - n : kGroupRows;
        for (int64_t r = 0; r < count; ++r) left[r] = scratch.raw + (n + r) * unit_stride;
        multiply_panel<A, kFlatVectors>(count, left, w_hr + j * units_depth * kFlatColumns, units_depth, nullptr, 0,
                                        sums, kFlatColumns);
        for (int64_t r = 0; r < count; ++r) {
          for (int v = 0; v < kFlatVectors; ++v) {
            const int64_t output = j * kFlatColumns + v * kWidth;
            if (output >= p.output_size) break;
            F h;
            load(sums + r * kFlatColumns + v * kWidth, h);
            if constexpr (kByRows) {
              store(scratch.proposed + (n + r) * state_stride + output, h);
            } else {
              emit(work, scratch, t, n + r, output, h);
            }
          }
        }
      }
    }
  }

  // A vector of h of step t: to the output, and to where the next step finds it.
  FASTGEN_MEMBER void emit(const RecurrentWork& work, const Scratch& scratch, int64_t t, int64_t at, int64_t j,
                           F h) const {
    const int64_t b = work.first_row + at;
    put(static_cast<Storage*>(p.output) + row_number(p, t, b) * p.output_size + j, h, lanes_from(j, p.output_size));
    if (scratch.h != nullptr) store(scratch.h + at * state_stride + j, h);
    store(scratch.fed[step_parity(t) ^ 1] + at * state_stride + j, masked(h, b, j));
  }

  void finish(const RecurrentWork& work, const Scratch& scratch) const {
    int64_t length = p.steps;
    for (int64_t b = work.first_row; b < work.end_row; ++b) {
      while (length > 0 && active_rows(p, length - 1) <= b) --length;
      const int64_t at = b - work.first_row;
      // The half of fed[] that the row's last step wrote.
      const Left* fed = scratch.fed[(p.reverse ? p.steps : length) & 1];
      for (int64_t j = 0; j < p.output_size; j += kWidth) {
        F h;
        if (scratch.h != nullptr) {
          load(scratch.h + at * state_stride + j, h);
        } else {
          load(fed + at * state_stride + j, h);
        }
        put(static_cast<Storage*>(p.h_n) + b * p.output_size + j, h, lanes_from(j, p.output_size));
      }
      if constexpr (kMode == CellMode::kLstm) {
        for (int64_t j = 0; j < p.hidden_size; j += kWidth) {
          F c;
          load(scratch.c + at * unit_stride + j, c);
          put(static_cast<Storage*>(p.c_n) + b * p.hidden_size + j, c, lanes_from(j, p.hidden_size));
        }
      }
    }
  }

  FASTGEN_MEMBER void save(int64_t row, int64_t unit, int count, F first, F second, F third, F fourth) const {
    Storage* gates = static_cast<Storage*>(p.gates) + row * 4 * p.hidden_size + unit;
    put(gates, first, count);
    put(gates + p.hidden_size, second, count);
    put(gates + 2 * p.hidden_size, third, count);
    put(gates + 3 * p.hidden_size, fourth, count);
  }

  // Which half of fed[] step t reads.
  FASTGEN_MEMBER int step_parity(int64_t t) const { return int((p.reverse ? p.steps - 1 - t : t) & 1); }

  static FASTGEN_MEMBER int lanes_from(int64_t first, int64_t size) {
    return size - first < kWidth ? int(size - first) : kWidth;
  }
  template <class V>
  static FASTGEN_MEMBER V take_upto(const Storage* row, int64_t j, int64_t size) {
    return j < size ? take<V>(row + j, lanes_from(j, size)) : V(T(0));
  }
  FASTGEN_MEMBER F masked(F h, int64_t b, int64_t j) const {
    if (p.h_mask == nullptr) return h;
    return h * take_upto<F>(static_cast<const Storage*>(p.h_mask) + b * p.output_size, j, p.output_size);
  }

  const RecurrentParams& p;
  const int64_t input_depth, state_depth, units_depth;  // rounded up to whole steps of the product
  const int64_t state_stride, unit_stride;              // rows of the states, in whole panels
  const int64_t blocks;
  const bool packs_input;  // or its panels are packed when they are wanted: where that is once
  const int64_t projection_blocks;
  Right *w_ih, *w_hh, *w_hr;
  T *bias, *bias_hn;
  int64_t packed_bytes;
};

}  // namespace
}  // namespace fastgen
