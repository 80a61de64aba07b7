// fastgen::recurrent and recurrent_backward on CUDA: fastgen/reference/recurrent.py, one kernel for all steps.
//
// The input's products are one matrix product of torch for all steps. What remains is a chain of steps, each of which
// waits for the whole h of the one before: so a cooperative kernel runs through all of them, each of its blocks has
// some units with their rows of W_hh in shared memory for good, and between two steps all blocks meet at a barrier
// (Diamos et al., "Persistent RNNs: stashing recurrent weights on-chip", 2016). Rows of the batch are independent of
// each other: where there are few units, groups of blocks take different ones.
//
// A product needs all units of its operand, and so a barrier before it; layer norm needs the statistics of a row, and
// so a barrier before each use. A step has the barriers
//   forward    W_hh h | [norm of it] | [norm of c'] | [W_hr h] |
//   backward   W_hh^T dgates | [W_hr^T dh] | [norm of c'] | [norm of W_hh h] |
// Between them each thread takes "its" units and rows, always the same ones: what it keeps for itself from step to step
// (c, h, dh, dc) needs no barrier.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../torch/recurrent_ops.h"
#include "check.h"
#include "recurrent_cell.h"
#include "recurrent_product.h"
#include "upload.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

// What the kernels of both directions have in common. The pointers of batch_sizes and step_rows are the device's.
template <class Params>
struct Sequence : Params {
  Product recurrent;   // forward: W_hh, of h; backward: its transpose, of the gradients of the gates
  Product projection;  // forward: W_hr, of o tanh(c'); backward: its transpose, of dh
  SharedPlan shared;
  int unit_blocks, groups;  // blocks that share the units, for one of so many groups of rows
  Zone zone_c, zone_h;
  const int64_t* seed_offset;  // null: nothing is drawn
  float *h, *c;                // [batch][P], [batch][H]: states from step to step, backward the gradients of them
  uint32_t* arrived;
};

struct ForwardParams : Sequence<RecurrentParams> {
  const void* from_input;  // [rows][G H]: W_ih x; with layer norm standardised
  // With layer norm:
  float* sums;                          // [batch][4 H]: W_hh h, and at the place of o the gate itself
  float* proposed;                      // [batch][H]: c' before zoneout
  float2 *gate_moments, *cell_moments;  // [batch][tiles]
};

struct BackwardParams : Sequence<RecurrentBackwardParams> {
  void *grad_gates_ih, *grad_gates_hh;  // [rows][G H]: of W_ih x and W_hh h; one matrix where they do not differ
  // With layer norm:
  const float *c_hat, *c_scale;   // [rows][H], [rows]: the standardised c'
  float *to_gates, *behind_norm;  // [rows][4 H]: of the gates' sums; [rows][H]: of what the norm of c' gave
  float2 *cell_sums, *gate_sums;  // [batch][tiles]: of the gradients and of their products with what they belong to
};

// The place of a step in the sequence.
struct Step {
  int64_t t, rows;  // rows: of the batch that are in it
};

FASTGEN_FN Step step_of(const RecurrentParams& p, int64_t s) {
  const int64_t t = p.reverse ? p.steps - 1 - s : s;
  return {t, p.batch_sizes == nullptr ? p.batch : p.batch_sizes[t]};
}
FASTGEN_FN int64_t row_of(const RecurrentParams& p, int64_t t, int64_t b) {
  return p.step_rows == nullptr ? t * p.row_step + b * p.row_batch : p.step_rows[t] + b;
}

// The part of a thread in both directions.
template <class Params>
struct Worker {
  const Params& p;
  GridBarrier barrier;
  const int block, group;  // of units, of rows
  const int unit, row;     // of a tile
  const bool owner;        // of an element of it

  __device__ explicit Worker(const Params& p)
      : p(p),
        barrier(p.arrived),
        block(int(blockIdx.x) % p.unit_blocks),
        group(int(blockIdx.x) / p.unit_blocks),
        unit(int(threadIdx.x) % kUnits),
        row(int(threadIdx.x) / kUnits),
        owner(int(threadIdx.x) < kUnits * kRows) {}

  // body(tile, b) for the tiles of this block among the first `rows` rows, the first of which is b.
  template <class Body>
  __device__ void tiles(const Product& product, int64_t rows, const Body& body) const {
    for (int64_t b = int64_t(group) * kRows; b < rows; b += int64_t(p.groups) * kRows) {
      for (int tile = product.first_tile(block); tile < product.end_tile(block); ++tile) body(tile, b);
    }
  }
  // body(b, u) for this thread's rows and units of a result.
  template <class Body>
  __device__ void elements(const Product& product, int64_t rows, const Body& body) const {
    tiles(product, rows, [&](int tile, int64_t b) {
      const int64_t u = int64_t(tile) * kUnits + unit;
      if (owner && b + row < rows && u < product.units) body(b + row, u);
    });
  }
  // body(b, u, valid, tile) for whole warps, of which all that are not `valid` only take part in shuffles.
  template <class Body>
  __device__ void warps(const Product& product, int64_t rows, const Body& body) const {
    tiles(product, rows, [&](int tile, int64_t b) {
      const int64_t u = int64_t(tile) * kUnits + unit;
      if (owner) body(b + row, u, b + row < rows && u < product.units, tile);
    });
  }
  // The same with the sums of the product with the first `fed` rows of `half` of the operand, zero for rows behind
  // them: body(b, u, valid, tile, sums).
  template <class Element, int kGroups, class Body>
  __device__ void multiply(const Product& product, int64_t half, int64_t fed, int64_t rows, const Body& body) const {
    tiles(product, rows, [&](int tile, int64_t b) {
      const int64_t left = fed - b, u = int64_t(tile) * kUnits + unit;
      if (left > 0) {
        const auto* operand = product.template operand_row<unsigned char>(half, b);
        multiply_tile<Element, kGroups>(product, tile, block, operand, int(left < kRows ? left : kRows), p.shared);
        block_barrier();
      }
      if (owner) {
        float sums[kGroups];
        FASTGEN_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          sums[g] = row < left ? sum_of<kGroups>(product, p.shared, g, unit, row) : 0.0f;
        }
        body(b + row, u, b + row < rows && u < product.units, tile, sums);
      }
      if (left > 0) block_barrier();
    });
  }
  __device__ int units_of(const Product& product, int tile) const {
    const int64_t left = product.units - int64_t(tile) * kUnits;
    return int(left < kUnits ? left : kUnits);
  }
};

// ---------------------------------------------------------------------------------------------------
// Forward

template <class Element, int kGates>
struct Forward : Worker<ForwardParams> {
  static constexpr bool kLstm = kGates == 4;
  using Worker<ForwardParams>::Worker;

  __device__ bool norm() const { return kLstm && p.norm_ih != nullptr; }
  __device__ bool projected() const { return kLstm && p.w_hr != nullptr; }
  __device__ const Product& last() const { return projected() ? p.projection : p.recurrent; }

  __device__ void run() {
    load_resident(p.recurrent, block);
    if (projected()) load_resident(p.projection, block);
    if (kLstm) {
      elements(p.recurrent, p.batch, [&](int64_t b, int64_t u) {
        p.c[b * p.hidden_size + u] = value_of<Element>(p.c_0, b * p.hidden_size + u);
      });
    }
    elements(last(), p.batch, [&](int64_t b, int64_t u) {
      const float h = value_of<Element>(p.h_0, b * p.output_size + u);
      p.h[b * p.output_size + u] = h;
      for (int half = 0; half < 2; ++half) feed(half, b, u, h);
    });
    for (int64_t s = 0; s < p.steps; ++s) {
      barrier.wait();
      step(step_of(p, s), s & 1);
    }
    elements(last(), p.batch, [&](int64_t b, int64_t u) {
      const int64_t at = b * p.output_size + u;
      narrow(p.h[at], static_cast<Element*>(p.h_n) + at);
    });
    if (!kLstm) return;
    elements(p.recurrent, p.batch, [&](int64_t b, int64_t u) {
      const int64_t at = b * p.hidden_size + u;
      narrow(p.c[at], static_cast<Element*>(p.c_n) + at);
    });
  }

  // The h that the next product reads.
  __device__ void feed(int64_t half, int64_t b, int64_t u, float h) const {
    const float mask = value_of<Element>(p.h_mask, b * p.output_size + u, 1.0f);
    narrow(h * mask, p.recurrent.operand_row<Element>(half, b) + u);
  }

  __device__ void step(const Step& now, int64_t half) {
    const int64_t units = p.hidden_size;
    multiply<Element, kGates>(p.recurrent, half, now.rows, now.rows,
                              [&](int64_t b, int64_t u, bool valid, int tile, const float (&sums)[kGates]) {
                                if (norm()) {
                                  for (int g = 0; valid && g < kGates; ++g)
                                    p.sums[b * kGates * units + g * units + u] = sums[g];
                                  const float2 moments = moments_of_tile(sums, units_of(p.recurrent, tile), valid);
                                  if (unit == 0 && b < now.rows) p.gate_moments[b * p.recurrent.tiles + tile] = moments;
                                } else if (valid) {
                                  float x[kGates];
                                  FASTGEN_UNROLL
                                  for (int g = 0; g < kGates; ++g) {
                                    const int64_t at = g * units + u;
                                    x[g] = value_of<Element>(p.from_input, row_of(p, now.t, b) * kGates * units + at) +
                                           value_of<Element>(p.b_ih, at);
                                  }
                                  cell(now, half, b, u, x, sums);
                                }
                              });
    if constexpr (kLstm) {
      if (norm()) {
        barrier.wait();
        norm_gates(now);
        barrier.wait();
        norm_cells(now, half);
      }
      if (projected()) {
        barrier.wait();
        multiply<Element, 1>(p.projection, 0, now.rows, now.rows,
                             [&](int64_t b, int64_t u, bool valid, int, const float (&sums)[1]) {
                               if (valid) emit(now, half, b, u, sums[0]);
                             });
      }
    }
  }

  // The cell of one unit and row, from the products with the input and the state.
  __device__ void cell(const Step& now, int64_t half, int64_t b, int64_t u, const float (&x)[kGates],
                       const float (&sums)[kGates]) const {
    const int64_t units = p.hidden_size, row = row_of(p, now.t, b);
    float s[kGates];
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) s[g] = sums[g] + value_of<Element>(p.b_hh, g * units + u);
    Element* gates = p.gates == nullptr ? nullptr : static_cast<Element*>(p.gates) + row * 4 * units + u;
    if constexpr (kLstm) {
      const float i = sigmoid_of(x[0] + s[0]), f = sigmoid_of(x[1] + s[1]), g = tanh_of(x[2] + s[2]),
                  o = sigmoid_of(x[3] + s[3]);
      save(gates, i, f, g, o);
      const float c = f * p.c[b * units + u] + i * g;
      keep_cell(row, b, u, c);
      emit_hidden(now, half, b, u, o * tanh_of(c));
    } else if constexpr (kGates == 3) {
      const float r = sigmoid_of(x[0] + s[0]), z = sigmoid_of(x[1] + s[1]), n = tanh_of(x[2] + r * s[2]);
      save(gates, r, z, n, s[2]);
      emit(now, half, b, u, (1.0f - z) * n + z * p.h[b * units + u]);
    } else {
      const float sum = x[0] + s[0];
      // Not a maximum, which would drop a NaN.
      const float h = p.mode == CellMode::kTanh ? tanh_of(sum) : sum < 0.0f ? 0.0f : sum;
      if (p.gates != nullptr) narrow(h, static_cast<Element*>(p.gates) + row * units + u);
      emit(now, half, b, u, h);
    }
  }

  __device__ void save(Element* gates, float a, float b, float c, float d) const {
    if (gates == nullptr) return;
    narrow(a, gates);
    narrow(b, gates + p.hidden_size);
    narrow(c, gates + 2 * p.hidden_size);
    narrow(d, gates + 3 * p.hidden_size);
  }

  // c' becomes c, by way of zoneout.
  __device__ void keep_cell(int64_t row, int64_t b, int64_t u, float c) const {
    const int64_t at = b * p.hidden_size + u;
    if (p.zone_c.used) {
      const float d = zone_at(p.zone_c, p.seed_offset, uint64_t(row * p.hidden_size + u));
      c = d * p.c[at] + (1.0f - d) * c;
    }
    p.c[at] = c;
    if (p.cells != nullptr) static_cast<float*>(p.cells)[row * (p.hidden_size + saved_scales(p)) + u] = c;
  }

  // o tanh(c'), which is h or projected to it.
  __device__ void emit_hidden(const Step& now, int64_t half, int64_t b, int64_t u, float h) const {
    if (projected()) {
      narrow(h, p.projection.operand_row<Element>(0, b) + u);
    } else {
      emit(now, half, b, u, h);
    }
  }

  // h' becomes h, by way of zoneout.
  __device__ void emit(const Step& now, int64_t half, int64_t b, int64_t u, float h) const {
    const int64_t at = b * p.output_size + u, row = row_of(p, now.t, b);
    if (p.zone_h.used) {
      const float d = zone_at(p.zone_h, p.seed_offset, uint64_t(row * p.output_size + u));
      h = d * p.h[at] + (1.0f - d) * h;
    }
    p.h[at] = h;
    narrow(h, static_cast<Element*>(p.output) + row * p.output_size + u);
    feed(1 - half, b, u, h);
  }

  // Layer norm of W_hh h, and the gates and c'.
  __device__ void norm_gates(const Step& now) const {
    const int64_t units = p.hidden_size;
    const int tiles = p.recurrent.tiles;
    warps(p.recurrent, now.rows, [&](int64_t b, int64_t u, bool valid, int tile) {
      const int64_t there = b < now.rows ? b : 0, row = row_of(p, now.t, there);
      const float2 moments = moments_of_row(p.gate_moments + there * tiles, tiles, units, 4);
      const float scale = 1.0f / square_root(moments.y + float(p.norm_eps));
      float c[1] = {0.0f};
      if (valid) {
        float* sums = p.sums + b * 4 * units + u;
        float a[4];
        Element* gates = p.gates == nullptr ? nullptr : static_cast<Element*>(p.gates) + row * 12 * units + u;
        FASTGEN_UNROLL
        for (int g = 0; g < 4; ++g) {
          const int64_t at = g * units + u;
          const float hat = (sums[g * units] - moments.x) * scale;
          a[g] = value_of<Element>(p.from_input, row * 4 * units + at) * value_of<Element>(p.norm_ih, at) +
                 value_of<Element>(p.b_ih, at) +
                 (hat * value_of<Element>(p.norm_hh, at) + value_of<Element>(p.b_hh, at));
          if (gates != nullptr) narrow(hat, gates + (8 + g) * units);
        }
        const float i = sigmoid_of(a[0]), f = sigmoid_of(a[1]), g = tanh_of(a[2]), o = sigmoid_of(a[3]);
        save(gates, i, f, g, o);
        c[0] = f * p.c[b * units + u] + i * g;
        p.proposed[b * units + u] = c[0];
        sums[3 * units] = o;
        if (u == 0 && p.cells != nullptr) static_cast<float*>(p.cells)[row * (units + 2) + units + 1] = scale;
      }
      const float2 of_tile = moments_of_tile(c, units_of(p.recurrent, tile), valid);
      if (unit == 0 && b < now.rows) p.cell_moments[b * tiles + tile] = of_tile;
    });
  }

  // Layer norm of c', and h'.
  __device__ void norm_cells(const Step& now, int64_t half) const {
    const int64_t units = p.hidden_size;
    const int tiles = p.recurrent.tiles;
    warps(p.recurrent, now.rows, [&](int64_t b, int64_t u, bool valid, int) {
      const int64_t there = b < now.rows ? b : 0;
      const float2 moments = moments_of_row(p.cell_moments + there * tiles, tiles, units, 1);
      if (!valid) return;
      const float c = p.proposed[b * units + u], scale = 1.0f / square_root(moments.y + float(p.norm_eps));
      const float y = (c - moments.x) * scale * value_of<Element>(p.norm_c, u) + value_of<Element>(p.norm_c_bias, u);
      keep_cell(row_of(p, now.t, b), b, u, c);
      emit_hidden(now, half, b, u, p.sums[b * 4 * units + 3 * units + u] * tanh_of(y));
    });
  }
};

template <class Element, int kGates>
__global__ void __launch_bounds__(kThreads) forward_kernel(ForwardParams p) {
  Forward<Element, kGates>(p).run();
}

// ---------------------------------------------------------------------------------------------------
// Backward

template <class Element, int kGates>
struct Backward : Worker<BackwardParams> {
  static constexpr bool kLstm = kGates == 4, kGru = kGates == 3;
  using Worker<BackwardParams>::Worker;

  __device__ bool norm() const { return kLstm && p.norm_ih != nullptr; }
  __device__ bool projected() const { return kLstm && p.w_hr != nullptr; }
  // Whose threads have the units of the cell.
  __device__ const Product& units() const { return projected() ? p.projection : p.recurrent; }

  __device__ void run() {
    load_resident(p.recurrent, block);
    if (projected()) load_resident(p.projection, block);
    elements(p.recurrent, p.batch, [&](int64_t b, int64_t u) {
      p.h[b * p.output_size + u] = value_of<Element>(p.grad_h_n, b * p.output_size + u);
    });
    if (kLstm) {
      elements(units(), p.batch, [&](int64_t b, int64_t u) {
        p.c[b * p.hidden_size + u] = value_of<Element>(p.grad_c_n, b * p.hidden_size + u);
      });
    }
    block_barrier();
    int64_t fed = 0;
    for (int64_t s = p.steps - 1; s >= 0; --s) {
      const Step now = step_of(p, s), before = s > 0 ? step_of(p, s - 1) : Step{0, 0};
      if (fed > 0) barrier.wait();
      step(now, before, fed, s & 1);
      fed = now.rows;
    }
    if (kLstm && p.grad_c_0 != nullptr) {
      elements(units(), p.batch, [&](int64_t b, int64_t u) {
        const int64_t at = b * p.hidden_size + u;
        narrow(p.c[at], static_cast<Element*>(p.grad_c_0) + at);
      });
    }
    if (p.grad_h_0 == nullptr) return;
    barrier.wait();
    multiply<Element, 1>(p.recurrent, 0, fed, p.batch,
                         [&](int64_t b, int64_t u, bool valid, int, const float (&sums)[1]) {
                           const int64_t at = b * p.output_size + u;
                           if (valid) narrow(returned(b, u, sums[0]), static_cast<Element*>(p.grad_h_0) + at);
                         });
  }

  // dh as the step behind left it: what came past the product, and through it.
  __device__ float returned(int64_t b, int64_t u, float sum) const {
    const int64_t at = b * p.output_size + u;
    return p.h[at] + sum * value_of<Element>(p.h_mask, at, 1.0f);
  }

  // fed: rows of the step behind, whose gradients of the gates stand in the other half of the operand.
  __device__ void step(const Step& now, const Step& before, int64_t fed, int64_t half) {
    multiply<Element, 1>(p.recurrent, 1 - half, fed, fed < now.rows ? now.rows : fed,
                         [&](int64_t b, int64_t u, bool valid, int tile, const float (&sums)[1]) {
                           float dh = 0.0f;
                           if (valid) {
                             const int64_t at = b * p.output_size + u;
                             dh = returned(b, u, sums[0]);
                             valid = b < now.rows;
                             if (!valid) p.h[at] = dh;  // the row begins with the step behind
                             if (valid) dh = state(now, b, u, dh);
                           }
                           if (!projected()) cell(now, before, half, b, u, valid, tile, dh);
                         });
    if constexpr (kLstm) {
      if (projected()) {
        barrier.wait();
        multiply<Element, 1>(p.projection, 0, now.rows, now.rows,
                             [&](int64_t b, int64_t u, bool valid, int tile, const float (&sums)[1]) {
                               cell(now, before, half, b, u, valid, tile, sums[0]);
                             });
      }
      if (norm()) {
        barrier.wait();
        norm_cells(now, before);
        barrier.wait();
        norm_gates(now, half);
      }
    }
  }

  // From the gradient of h, to which that of the output comes, to that of h' in front of zoneout.
  __device__ float state(const Step& now, int64_t b, int64_t u, float dh) const {
    const int64_t at = b * p.output_size + u, row = row_of(p, now.t, b);
    const int64_t first = p.step_rows == nullptr ? now.t * p.grad_step + b * p.grad_batch : row * p.grad_batch;
    dh = dh + value_of<Element>(p.grad_output, first + u);
    float past = 0.0f;
    if (p.zone_h.used) {
      const float d = zone_at(p.zone_h, p.seed_offset, uint64_t(row * p.output_size + u));
      past = d * dh;
      dh = (1.0f - d) * dh;
    }
    p.h[at] = past;
    if (projected()) {
      narrow(dh, p.projection.operand_row<Element>(0, b) + u);
      if (p.grad_hidden != nullptr) narrow(dh, static_cast<Element*>(p.grad_hidden) + row * p.output_size + u);
    }
    return dh;
  }

  // What the row's step began with.
  __device__ float h_before(const Step& before, int64_t b, int64_t u) const {
    return b < before.rows ? value_of<Element>(p.output, row_of(p, before.t, b) * p.output_size + u)
                           : value_of<Element>(p.h_0, b * p.output_size + u);
  }
  __device__ float c_before(const Step& before, int64_t b, int64_t u) const {
    const int64_t width = p.hidden_size + saved_scales(p);
    return b < before.rows ? static_cast<const float*>(p.cells)[row_of(p, before.t, b) * width + u]
                           : value_of<Element>(p.c_0, b * p.hidden_size + u);
  }

  // The gradients of the gates' sums of one unit and row, from that of h'; the whole warp calls.
  __device__ void cell(const Step& now, const Step& before, int64_t half, int64_t b, int64_t u, bool valid, int tile,
                       float dh) const {
    const int64_t units = p.hidden_size, row = valid ? row_of(p, now.t, b) : 0;
    if constexpr (kLstm) {
      if (norm()) return behind_norm(now, row, b, u, valid, tile, dh);
    }
    if (!valid) return;
    const auto* gates = static_cast<const Element*>(p.gates) + row * saved_gates(p) * units + u;
    if constexpr (kLstm) {
      const float i = widen(gates[0]), f = widen(gates[units]), g = widen(gates[2 * units]),
                  o = widen(gates[3 * units]);
      const float c_0 = c_before(before, b, u);
      const float c_1 = p.zone_c.used ? f * c_0 + i * g : static_cast<const float*>(p.cells)[row * units + u];
      const float t = tanh_of(c_1);
      if (p.hidden != nullptr) narrow(o * t, static_cast<Element*>(p.hidden) + row * units + u);
      const float from_h = dh * o * (1.0f - t * t), dc = from_h + cell_gradient(row, b, u, f, from_h);
      const float grads[] = {dc * g * i * (1.0f - i), dc * c_0 * f * (1.0f - f), dc * i * (1.0f - g * g),
                             dh * t * o * (1.0f - o)};
      give(half, row, b, u, grads, grads);
    } else if constexpr (kGru) {
      const float r = widen(gates[0]), z = widen(gates[units]), n = widen(gates[2 * units]),
                  h_n = widen(gates[3 * units]);
      const float dn = dh * (1.0f - z) * (1.0f - n * n), dz = dh * (h_before(before, b, u) - n) * z * (1.0f - z),
                  dr = dn * h_n * r * (1.0f - r);
      const float from_input[] = {dr, dz, dn}, from_state[] = {dr, dz, dn * r};
      give(half, row, b, u, from_input, from_state);
      p.h[b * units + u] = p.h[b * units + u] + dh * z;
    } else {
      // With zoneout h' is kept beside h.
      const float h = p.zone_h.used ? widen(gates[0]) : value_of<Element>(p.output, row * units + u);
      const float grads[] = {p.mode == CellMode::kTanh ? dh * (1.0f - h * h) : h > 0.0f ? dh : 0.0f};
      give(half, row, b, u, grads, grads);
    }
  }

  // The part of the gradient of c' that comes from c, which goes on to the c before with what h gave.
  __device__ float cell_gradient(int64_t row, int64_t b, int64_t u, float f, float from_h) const {
    float& dc = p.c[b * p.hidden_size + u];
    float from_c = dc, past = 0.0f;
    if (p.zone_c.used) {
      const float d = zone_at(p.zone_c, p.seed_offset, uint64_t(row * p.hidden_size + u));
      past = d * from_c;
      from_c = (1.0f - d) * from_c;
    }
    dc = (from_h + from_c) * f + past;
    return from_c;
  }

  __device__ void give(int64_t half, int64_t row, int64_t b, int64_t u, const float (&from_input)[kGates],
                       const float (&from_state)[kGates]) const {
    const int64_t units = p.hidden_size, first = row * kGates * units + u;
    auto* operand = p.recurrent.operand_row<Element>(half, b) + u;
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      narrow(from_state[g], operand + g * units);
      narrow(from_state[g], static_cast<Element*>(p.grad_gates_hh) + first + g * units);
      if (kGru) narrow(from_input[g], static_cast<Element*>(p.grad_gates_ih) + first + g * units);
    }
  }

  // With layer norm: the gradient of what the norm of c' gave, and the sums that the way back through it needs.
  __device__ void behind_norm(const Step& now, int64_t row, int64_t b, int64_t u, bool valid, int tile,
                              float dh) const {
    const int64_t units = p.hidden_size;
    float2 sums = {0.0f, 0.0f};
    if (valid) {
      const float o = widen(static_cast<const Element*>(p.gates)[row * 12 * units + 3 * units + u]);
      const float hat = p.c_hat[row * units + u], gain = value_of<Element>(p.norm_c, u);
      const float t = tanh_of(hat * gain + value_of<Element>(p.norm_c_bias, u));
      if (p.hidden != nullptr) narrow(o * t, static_cast<Element*>(p.hidden) + row * units + u);
      const float behind = dh * o * (1.0f - t * t);
      p.behind_norm[row * units + u] = behind;
      p.to_gates[row * 4 * units + 3 * units + u] = dh * t * o * (1.0f - o);
      sums = {behind * gain, behind * gain * hat};
    }
    leave(p.cell_sums, now, b, tile, sums);
  }

  // The sums of a tile, for all that need those of its rows.
  __device__ void leave(float2* to, const Step& now, int64_t b, int tile, float2 sums) const {
    sums = {sum_of_units(sums.x), sum_of_units(sums.y)};
    if (unit == 0 && b < now.rows) to[b * this->units().tiles + tile] = sums;
  }

  // Back through the norm of c', and to the gates' sums.
  __device__ void norm_cells(const Step& now, const Step& before) const {
    const int64_t units = p.hidden_size;
    const int tiles = this->units().tiles;
    warps(this->units(), now.rows, [&](int64_t b, int64_t u, bool valid, int tile) {
      const int64_t there = b < now.rows ? b : 0, row = row_of(p, now.t, there);
      const float2 of_row = sums_of_row(p.cell_sums + there * tiles, tiles);
      float2 sums = {0.0f, 0.0f};
      if (valid) {
        const auto* gates = static_cast<const Element*>(p.gates) + row * 12 * units + u;
        const float i = widen(gates[0]), f = widen(gates[units]), g = widen(gates[2 * units]);
        const float hat = p.c_hat[row * units + u];
        const float front = p.behind_norm[row * units + u] * value_of<Element>(p.norm_c, u);
        const float from_h = p.c_scale[row] * (front - of_row.x / float(units) - hat * (of_row.y / float(units)));
        const float dc = from_h + cell_gradient(row, b, u, f, from_h);
        float* grads = p.to_gates + row * 4 * units + u;
        grads[0] = dc * g * i * (1.0f - i);
        grads[units] = dc * c_before(before, b, u) * f * (1.0f - f);
        grads[2 * units] = dc * i * (1.0f - g * g);
        FASTGEN_UNROLL
        for (int k = 0; k < 4; ++k) {
          const float grad = grads[k * units] * value_of<Element>(p.norm_hh, k * units + u);
          sums.x = sums.x + grad;
          sums.y = sums.y + grad * widen(gates[(8 + k) * units]);
        }
      }
      leave(p.gate_sums, now, b, tile, sums);
    });
  }

  // Back through the norm of W_hh h.
  __device__ void norm_gates(const Step& now, int64_t half) const {
    const int64_t units = p.hidden_size;
    const int tiles = this->units().tiles;
    warps(this->units(), now.rows, [&](int64_t b, int64_t u, bool valid, int) {
      const int64_t there = b < now.rows ? b : 0, row = row_of(p, now.t, there);
      const float2 sums = sums_of_row(p.gate_sums + there * tiles, tiles);
      if (!valid) return;
      const float mean = sums.x / float(4 * units), slope = sums.y / float(4 * units);
      const float scale = static_cast<const float*>(p.cells)[row * (units + 2) + units + 1];
      const auto* hats = static_cast<const Element*>(p.gates) + row * 12 * units + 8 * units + u;
      float grads[kGates];
      FASTGEN_UNROLL
      for (int k = 0; k < kGates; ++k) {
        const float grad = p.to_gates[row * 4 * units + k * units + u] * value_of<Element>(p.norm_hh, k * units + u);
        grads[k] = scale * (grad - mean - widen(hats[k * units]) * slope);
      }
      give(half, row, b, u, grads, grads);
    });
  }
};

template <class Element, int kGates>
__global__ void __launch_bounds__(kThreads) backward_kernel(BackwardParams p) {
  Backward<Element, kGates>(p).run();
}

// ---------------------------------------------------------------------------------------------------
// Over all rows of all steps

constexpr int kRowThreads = 256;

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x = x + shuffle_xor(x, step);
  return x;
}

// body(i) for the warps of a grid.
template <class Body>
__device__ void for_rows(int64_t count, const Body& body) {
  const int64_t warps = int64_t(gridDim.x) * (kRowThreads / 32);
  for (int64_t i = (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) / 32; i < count; i += warps) body(i);
}

// The mean of a row that `value(j)` gives, and 1 / sqrt(variance + eps).
template <class Value>
__device__ float2 mean_and_scale(int64_t width, double eps, const Value& value) {
  float sum = 0.0f, squares = 0.0f;
  for (int64_t j = threadIdx.x % 32; j < width; j += 32) sum = sum + value(j);
  const float mean = warp_sum(sum) / float(width);
  for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
    const float away = value(j) - mean;
    squares = squares + away * away;
  }
  return {mean, 1.0f / square_root(warp_sum(squares) / float(width) + float(eps))};
}

// Layer norm of W_ih x: standardises its rows, and saves them.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) standardise_kernel(RecurrentParams p, Element* x) {
  const int64_t units = p.hidden_size, width = 4 * units;
  for_rows(p.rows, [&](int64_t i) {
    Element* row = x + i * width;
    const float2 moments = mean_and_scale(width, p.norm_eps, [&](int64_t j) { return widen(row[j]); });
    auto* hat = p.gates == nullptr ? nullptr : static_cast<Element*>(p.gates) + i * 12 * units + 4 * units;
    for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
      narrow((widen(row[j]) - moments.x) * moments.y, row + j);
      if (hat != nullptr) hat[j] = row[j];
    }
    if (threadIdx.x % 32 == 0 && p.cells != nullptr) static_cast<float*>(p.cells)[i * (units + 2) + units] = moments.y;
  });
}

// The standardised c' of all rows, and what they were multiplied with.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) cells_kernel(BackwardParams p, float* c_hat, float* c_scale) {
  const int64_t units = p.hidden_size, width = units + 2;
  const auto* cells = static_cast<const float*>(p.cells);
  for_rows(p.steps * p.batch, [&](int64_t i) {
    const int64_t s = i / p.batch, b = i % p.batch;
    const Step now = step_of(p, s), before = s > 0 ? step_of(p, s - 1) : Step{0, 0};
    if (b >= now.rows) return;
    const int64_t row = row_of(p, now.t, b);
    const auto* gates = static_cast<const Element*>(p.gates) + row * 12 * units;
    const auto value = [&](int64_t u) {
      if (!p.zone_c.used) return cells[row * width + u];
      const float c =
          b < before.rows ? cells[row_of(p, before.t, b) * width + u] : value_of<Element>(p.c_0, b * units + u);
      return widen(gates[units + u]) * c + widen(gates[u]) * widen(gates[2 * units + u]);
    };
    const float2 moments = mean_and_scale(units, p.norm_eps, value);
    for (int64_t u = threadIdx.x % 32; u < units; u += 32) {
      c_hat[row * units + u] = (value(u) - moments.x) * moments.y;
    }
    if (threadIdx.x % 32 == 0) c_scale[row] = moments.y;
  });
}

// Back through the norm of W_ih x.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) input_norm_kernel(BackwardParams p) {
  const int64_t units = p.hidden_size, width = 4 * units;
  for_rows(p.rows, [&](int64_t i) {
    const float* to_gates = p.to_gates + i * width;
    const auto* hat = static_cast<const Element*>(p.gates) + i * 12 * units + 4 * units;
    float sum = 0.0f, across = 0.0f;
    for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
      const float grad = to_gates[j] * value_of<Element>(p.norm_ih, j);
      sum = sum + grad;
      across = across + grad * widen(hat[j]);
    }
    const float mean = warp_sum(sum) / float(width), slope = warp_sum(across) / float(width);
    const float scale = static_cast<const float*>(p.cells)[i * (units + 2) + units];
    for (int64_t j = threadIdx.x % 32; j < width; j += 32) {
      const float grad = to_gates[j] * value_of<Element>(p.norm_ih, j);
      narrow(scale * (grad - mean - widen(hat[j]) * slope), static_cast<Element*>(p.grad_gates_ih) + i * width + j);
    }
  });
}

// The h that each row's step was fed, [rows][P]: what the gradient of W_hh is a product with.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) fed_kernel(RecurrentParams p, Element* fed) {
  const int64_t width = p.output_size, count = p.steps * p.batch * width;
  for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kRowThreads) {
    const int64_t s = i / (p.batch * width), b = i / width % p.batch, u = i % width;
    const Step now = step_of(p, s), before = s > 0 ? step_of(p, s - 1) : Step{0, 0};
    if (b >= now.rows) continue;
    const float h = b < before.rows ? value_of<Element>(p.output, row_of(p, before.t, b) * width + u)
                                    : value_of<Element>(p.h_0, b * width + u);
    narrow(h * value_of<Element>(p.h_mask, b * width + u, 1.0f), fed + row_of(p, now.t, b) * width + u);
  }
}

// ---------------------------------------------------------------------------------------------------
// The ops

void* data_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

template <class Body>
void by_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
    default: return body(float{});
  }
}
template <class Body>
void by_gates(CellMode mode, const Body& body) {
  switch (gate_count(mode)) {
    case 4: return body(std::integral_constant<int, 4>{});
    case 3: return body(std::integral_constant<int, 3>{});
    default: return body(std::integral_constant<int, 1>{});
  }
}

// Products and sums of torch's, by the variants that write to a given tensor: those autocast leaves alone.
void multiply_into(const Tensor& out, const Tensor& left, const Tensor& right) {
  call_op<Tensor>("aten::mm", "out", left, right, out);
}
Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// What runs before and after the kernel of a sequence, in one place for both directions.
class Sequencer {
 public:
  Sequencer(RecurrentArguments& arguments, const Tensor& like)
      : arguments_(arguments), like_(like), device_(like), stream_(current_stream(like)) {}

  cudaStream_t stream() const { return stream_; }
  int64_t element_size() const { return int64_t(like_.element_size()); }

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const {
    return torch::stable::new_empty(like_, {sizes.data(), sizes.size()}, dtype);
  }
  Tensor empty(const std::vector<int64_t>& sizes) const { return empty(sizes, arguments_.dtype()); }
  // Memory for the time of this call. torch gives it out again in the order of the stream.
  float* scratch(int64_t rows, int64_t columns) {
    return static_cast<float*>(keep(empty({rows, columns}, ScalarType::Float)));
  }
  void* keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return data_of(kept_.back());
  }

  // The rows of a tensor as a matrix, outside of any graph.
  Tensor matrix(const Tensor& tensor) const {
    const Tensor plain = call_op<Tensor>("aten::detach", "", tensor);
    const int64_t sizes[] = {arguments_.p.rows, tensor.size(tensor.dim() - 1)};
    return torch::stable::reshape(plain, {sizes, 2});
  }

  // Layer norm and zoneout.
  void set(CellOptions& p, const Optional& norm_ih, const Optional& norm_hh, const Optional& norm_c,
           const Optional& norm_c_bias, double norm_eps, double zoneout_c, double zoneout_h) {
    const RecurrentParams& r = arguments_.p;
    const bool lstm = r.mode == CellMode::kLstm, norm = norm_ih.has_value();
    STD_TORCH_CHECK(
        norm == norm_hh.has_value() && norm == norm_c.has_value() && norm == norm_c_bias.has_value() && (lstm || !norm),
        "norm_ih, norm_hh, norm_c, norm_c_bias: expected all or none, and none but for an LSTM");
    STD_TORCH_CHECK(zoneout_c >= 0 && zoneout_c <= 1 && zoneout_h >= 0 && zoneout_h <= 1 && (lstm || zoneout_c == 0),
                    "zoneout_c, zoneout_h: expected probabilities, and 0 for c where there is none, got ", zoneout_c,
                    " and ", zoneout_h);
    const auto gain = [&](const char* name, const Optional& tensor, int64_t size) {
      check_shape(name, tensor, like_, {size});
      return arguments_.contiguous(tensor);
    };
    p.norm_ih = gain("norm_ih", norm_ih, 4 * r.hidden_size);
    p.norm_hh = gain("norm_hh", norm_hh, 4 * r.hidden_size);
    p.norm_c = gain("norm_c", norm_c, r.hidden_size);
    p.norm_c_bias = gain("norm_c_bias", norm_c_bias, r.hidden_size);
    p.norm_eps = norm_eps;
    p.zoneout_c = zoneout_c;
    p.zoneout_h = zoneout_h;
  }

  // What the kernels of both directions need beyond their arguments.
  template <class Params>
  void prepare(Sequence<Params>& p, const Optional& seed_offset) {
    if (p.batch_sizes != nullptr) {
      std::vector<int64_t> steps(p.batch_sizes, p.batch_sizes + p.steps);
      steps.insert(steps.end(), p.step_rows, p.step_rows + p.steps);
      const auto* uploaded = static_cast<const int64_t*>(keep(upload(steps, like_)));
      p.batch_sizes = uploaded;
      p.step_rows = uploaded + p.steps;
    }
    const auto zone = [](double share, int64_t first) {
      return Zone{share > 0, float(share), uint64_t(std::nearbyint(share * 0x1p32)), uint64_t(first)};
    };
    p.zone_c = zone(p.zoneout_c, 0);
    p.zone_h = zone(p.zoneout_h, p.mode == CellMode::kLstm ? p.rows * p.hidden_size : 0);
    if (seed_offset) {
      check_seed_offset(*seed_offset, 1);
      STD_TORCH_CHECK(on_device(*seed_offset), "seed_offset: expected a tensor on the device of input");
      p.seed_offset = static_cast<const int64_t*>(arguments_.contiguous(seed_offset));
    }
    p.h = scratch(p.batch, p.output_size);
    if (p.mode == CellMode::kLstm) p.c = scratch(p.batch, p.hidden_size);
    const int64_t one = 1;
    p.arrived = static_cast<uint32_t*>(keep(torch::stable::new_zeros(like_, {&one, 1}, ScalarType::Int)));
  }

  // A product whose operand has `halves` halves; its matrix comes from `source`, whose strides these are.
  Product product(int64_t units, int64_t width, int groups, int halves, const void* source, int64_t group_stride,
                  int64_t unit_stride, int64_t stride) {
    Product out{};
    out.units = units;
    out.width = width;
    out.batch = arguments_.p.batch;
    out.groups = groups;
    out.chunks = int(ceil_div(width * element_size(), kChunk));
    out.tiles = int(ceil_div(units, kUnits));
    const int64_t operand = halves * out.batch * out.operand_pitch(), matrix = out.tiles * out.tile_bytes();
    out.operand = static_cast<unsigned char*>(keep(torch::stable::new_zeros(like_, {&operand, 1}, ScalarType::Byte)));
    out.matrix = static_cast<unsigned char*>(keep(empty({matrix}, ScalarType::Byte)));
    const auto blocks = unsigned(std::min<int64_t>(ceil_div(matrix / element_size(), kThreads), 8 * multiprocessors()));
    by_element(arguments_.p.dtype, [&](auto element) {
      using Element = decltype(element);
      const PackParams<Element> p{static_cast<const Element*>(source), group_stride, unit_stride, stride, out};
      launch(pack_kernel<Element>, blocks, kThreads, 0, stream_, p);
    });
    return out;
  }

  template <class Params>
  void launch_sequence(void (*kernel)(Params), Params& p) const {
    plan(p);
    launch_cooperative(kernel, unsigned(p.unit_blocks * p.groups), kThreads, size_t(p.shared.bytes), stream_, p);
  }

  unsigned row_blocks(int64_t warps) const {
    return unsigned(std::min<int64_t>(ceil_div(warps, kRowThreads / 32), 16 * multiprocessors()));
  }

 private:
  // Units over the multiprocessors, as evenly as they go, and rows of the batch over what remains; and which matrices
  // stay on the chip.
  template <class Params>
  void plan(Sequence<Params>& p) const {
    const int most = std::max(p.recurrent.tiles, p.projection.tiles), room = multiprocessors();
    p.unit_blocks = int(ceil_div(most, ceil_div(most, room)));
    p.groups = int(std::max<int64_t>(1, std::min<int64_t>(room / p.unit_blocks, ceil_div(p.batch, kRows))));
    p.recurrent.tiles_of_block = int(ceil_div(p.recurrent.tiles, p.unit_blocks));
    p.projection.tiles_of_block = int(ceil_div(p.projection.tiles, p.unit_blocks));
    const auto resident = [](const Product& product) { return product.tiles_of_block * product.tile_bytes(); };
    const int64_t sums = int64_t(sizeof(float)) * kWarps * kGroupsMost * kUnits * kSumPitch;
    const int64_t limit = int64_t(shared_limit());
    const auto other = [&](int64_t stage) { return kWarps * kStages * stage + sums; };
    int64_t first = resident(p.recurrent), second = resident(p.projection);
    int64_t stage = kStageOperand;
    if (first + second + other(stage) > limit) {
      stage = kStageStreamed;
      second = p.projection.tiles > 0 && second + other(stage) <= limit && first + other(stage) > limit ? second : 0;
      first = first + other(stage) <= limit ? first : 0;
    }
    p.recurrent.shared = first > 0 ? 0 : -1;
    p.projection.shared = second > 0 ? int(first) : -1;
    p.shared.rings = int(first + second);
    p.shared.stage = int(stage);
    p.shared.sums = p.shared.rings + int(kWarps * kStages * stage);
    p.shared.bytes = p.shared.sums + int(sums);
  }

  RecurrentArguments& arguments_;
  const Tensor& like_;
  OnDevice device_;
  cudaStream_t stream_;
  std::vector<Tensor> kept_;
};

// Whether the kernels take a call; the rest goes to the reference.
bool takes(const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results recurrent(int64_t mode, const Tensor& input, const Optional& batch_sizes, const Tensor& w_ih,
                  const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, const Optional& w_hr,
                  const Tensor& h_0, const Optional& c_0, const Optional& h_mask, bool batch_first, bool reverse,
                  bool save, const Optional& norm_ih, const Optional& norm_hh, const Optional& norm_c,
                  const Optional& norm_c_bias, const Optional& seed_offset, double norm_eps, double zoneout_c,
                  double zoneout_h) {
  if (!takes(input)) {
    return plain<Results>("fastgen::recurrent", mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0,
                          h_mask, batch_first, reverse, save, norm_ih, norm_hh, norm_c, norm_c_bias, seed_offset,
                          norm_eps, zoneout_c, zoneout_h);
  }
  RecurrentArguments arguments(mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, batch_first,
                               reverse);
  Sequencer call(arguments, input);
  ForwardParams p{};
  static_cast<RecurrentParams&>(p) = arguments.p;
  call.set(p, norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps, zoneout_c, zoneout_h);
  const bool lstm = p.mode == CellMode::kLstm, gated = saved_gates(p) > 0, norm = norm_ih.has_value();
  const int64_t units = p.hidden_size, outputs = p.output_size;
  Tensor output = call.empty(arguments.rows_of(outputs)), h_n = call.empty({p.batch, outputs});
  Tensor c_n = lstm ? call.empty({p.batch, units}) : call.empty({0});
  Tensor gates = save && gated ? call.empty(arguments.rows_of(saved_gates(p) * units)) : call.empty({0});
  Tensor cells =
      save && lstm ? call.empty(arguments.rows_of(units + saved_scales(p)), ScalarType::Float) : call.empty({0});
  if (p.batch == 0) return {output, h_n, c_n, gates, cells};
  p.output = data_of(output);
  p.h_n = data_of(h_n);
  p.c_n = lstm ? data_of(c_n) : nullptr;
  p.gates = save && gated ? data_of(gates) : nullptr;
  p.cells = save && lstm ? data_of(cells) : nullptr;

  const Tensor from_input = call.empty({p.rows, w_ih.size(0)});
  multiply_into(from_input, call.matrix(input), transposed(call_op<Tensor>("aten::detach", "", w_ih)));
  p.from_input = data_of(from_input);
  call.prepare(p, seed_offset);
  p.recurrent = call.product(units, outputs, gate_count(p.mode), 2, p.w_hh, units * outputs, outputs, 1);
  if (w_hr) p.projection = call.product(outputs, units, 1, 1, p.w_hr, 0, units, 1);
  if (norm) {
    p.sums = call.scratch(p.batch, 4 * units);
    p.proposed = call.scratch(p.batch, units);
    p.gate_moments = reinterpret_cast<float2*>(call.scratch(p.batch, 2 * p.recurrent.tiles));
    p.cell_moments = reinterpret_cast<float2*>(call.scratch(p.batch, 2 * p.recurrent.tiles));
  }
  by_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (norm) {
      launch(standardise_kernel<Element>, call.row_blocks(p.rows), kRowThreads, 0, call.stream(), p,
             static_cast<Element*>(data_of(from_input)));
    }
    by_gates(p.mode, [&](auto gates) { call.launch_sequence(forward_kernel<Element, decltype(gates)::value>, p); });
  });
  return {output, h_n, c_n, gates, cells};
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients recurrent_backward(int64_t mode, const Optional& grad_output, const Optional& grad_h_n,
                             const Optional& grad_c_n, const Tensor& input, const Optional& batch_sizes,
                             const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                             const Optional& w_hr, const Tensor& h_0, const Optional& c_0, const Optional& h_mask,
                             const Tensor& output, const Tensor& gates, const Tensor& cells, bool batch_first,
                             bool reverse, int64_t needs, const Optional& norm_ih, const Optional& norm_hh,
                             const Optional& norm_c, const Optional& norm_c_bias, const Optional& seed_offset,
                             double norm_eps, double zoneout_c, double zoneout_h) {
  if (!takes(input)) {
    return plain<Gradients>("fastgen::recurrent_backward", mode, grad_output, grad_h_n, grad_c_n, input, batch_sizes,
                            w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, output, gates, cells, batch_first, reverse,
                            needs, norm_ih, norm_hh, norm_c, norm_c_bias, seed_offset, norm_eps, zoneout_c, zoneout_h);
  }
  RecurrentArguments arguments(mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, batch_first,
                               reverse);
  Sequencer call(arguments, input);
  BackwardParams p{};
  static_cast<RecurrentParams&>(p) = arguments.p;
  call.set(p, norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps, zoneout_c, zoneout_h);
  const ScalarType dtype = arguments.dtype();
  const int64_t units = p.hidden_size, outputs = p.output_size, columns = w_hh.size(0);
  const bool lstm = p.mode == CellMode::kLstm, gated = saved_gates(p) > 0, norm = norm_ih.has_value();
  arguments.check_rows("grad_output", grad_output, input, outputs, dtype);
  arguments.check_rows("output", output, input, outputs, dtype);
  if (gated) arguments.check_rows("gates", gates, input, saved_gates(p) * units, dtype);
  if (lstm) arguments.check_rows("cells", cells, input, units + saved_scales(p), ScalarType::Float);
  check_shape("grad_h_n", grad_h_n, input, {p.batch, outputs});
  check_shape("grad_c_n", grad_c_n, input, {p.batch, units});

  const auto result = [&](int bit, const Optional& of) {
    if (!(needs >> bit & 1) || !of) return call.empty({0});
    const auto sizes = of->sizes();
    return call.empty({sizes.begin(), sizes.end()});
  };
  Tensor grad_input = result(0, input), grad_w_ih = result(1, w_ih), grad_w_hh = result(2, w_hh),
         grad_b_ih = result(3, b_ih), grad_b_hh = result(4, b_hh), grad_w_hr = result(5, w_hr),
         grad_h_0 = result(6, h_0), grad_c_0 = result(7, c_0), grad_norm_ih = result(8, norm_ih),
         grad_norm_hh = result(9, norm_hh), grad_norm_c = result(10, norm_c),
         grad_norm_c_bias = result(11, norm_c_bias);
  const auto needed = [&](int bit, const Optional& of) { return bool(needs >> bit & 1) && of.has_value(); };
  const Gradients results{grad_input, grad_w_ih, grad_w_hh,    grad_b_ih,    grad_b_hh,   grad_w_hr,
                          grad_h_0,   grad_c_0,  grad_norm_ih, grad_norm_hh, grad_norm_c, grad_norm_c_bias};
  if (p.batch == 0) {
    std::apply([](auto... grads) { (torch::stable::zero_(grads), ...); }, results);
    return results;
  }

  if (grad_output) p.grad_output = arguments.rows(*grad_output, p.grad_step, p.grad_batch);
  p.grad_h_n = arguments.contiguous(grad_h_n);
  p.grad_c_n = arguments.contiguous(grad_c_n);
  // Read only: the pointers of the base are those that the forward pass writes.
  p.output = const_cast<void*>(arguments.contiguous(output));
  p.gates = const_cast<void*>(arguments.contiguous(gates));
  p.cells = const_cast<void*>(arguments.contiguous(cells));
  p.grad_h_0 = needed(6, h_0) ? data_of(grad_h_0) : nullptr;
  p.grad_c_0 = needed(7, c_0) ? data_of(grad_c_0) : nullptr;

  const auto matrix_of = [&](int64_t width, ScalarType type) { return call.empty({p.rows, width}, type); };
  const bool two = norm || p.mode == CellMode::kGru;
  const Tensor grad_hh = matrix_of(columns, dtype), grad_ih = two ? matrix_of(columns, dtype) : grad_hh;
  p.grad_gates_hh = data_of(grad_hh);
  p.grad_gates_ih = data_of(grad_ih);
  Optional hidden, grad_hidden, c_hat, to_gates, behind_norm;
  if (needed(5, w_hr)) {
    hidden = matrix_of(units, dtype);
    grad_hidden = matrix_of(outputs, dtype);
    p.hidden = data_of(*hidden);
    p.grad_hidden = data_of(*grad_hidden);
  }
  call.prepare(p, seed_offset);
  p.recurrent = call.product(outputs, columns, 1, 2, p.w_hh, 0, 1, outputs);
  if (w_hr) p.projection = call.product(units, outputs, 1, 1, p.w_hr, 0, 1, units);
  if (norm) {
    c_hat = matrix_of(units, ScalarType::Float);
    to_gates = matrix_of(columns, ScalarType::Float);
    behind_norm = matrix_of(units, ScalarType::Float);
    float* c_scale = call.scratch(p.rows, 1);
    p.c_hat = static_cast<const float*>(data_of(*c_hat));
    p.c_scale = c_scale;
    p.to_gates = static_cast<float*>(data_of(*to_gates));
    p.behind_norm = static_cast<float*>(data_of(*behind_norm));
    const int64_t tiles = ceil_div(units, kUnits);
    p.cell_sums = reinterpret_cast<float2*>(call.scratch(p.batch, 2 * tiles));
    p.gate_sums = reinterpret_cast<float2*>(call.scratch(p.batch, 2 * tiles));
    by_element(p.dtype, [&](auto element) {
      launch(cells_kernel<decltype(element)>, call.row_blocks(p.steps * p.batch), kRowThreads, 0, call.stream(), p,
             static_cast<float*>(data_of(*c_hat)), c_scale);
    });
  }
  by_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    by_gates(p.mode, [&](auto gates) { call.launch_sequence(backward_kernel<Element, decltype(gates)::value>, p); });
    if (norm) launch(input_norm_kernel<Element>, call.row_blocks(p.rows), kRowThreads, 0, call.stream(), p);
  });

  // Products and sums over all rows of all steps at once.
  const auto sum_into = [&](Tensor& out, const Tensor& rows) {
    // In float32, and rounded once.
    const int64_t first = 0;
    const bool wide = rows.scalar_type() != out.scalar_type();
    Tensor sum = wide ? call.empty({out.size(0)}, rows.scalar_type()) : out;
    torch::stable::sum_out(sum, rows, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1), false, rows.scalar_type());
    if (wide) torch::stable::copy_(out, sum);
  };
  const auto weighted_into = [&](Tensor& out, const Tensor& rows, const Tensor& weights) {
    sum_into(out, call_op<Tensor>("aten::mul", "Tensor", rows, weights));
  };
  if (needed(0, input)) {
    const int64_t sizes[] = {p.rows, p.input_size};
    multiply_into(torch::stable::view(grad_input, {sizes, 2}), grad_ih, call_op<Tensor>("aten::detach", "", w_ih));
  }
  if (needed(1, w_ih)) multiply_into(grad_w_ih, transposed(grad_ih), call.matrix(input));
  if (needed(2, w_hh)) {
    const Tensor fed = matrix_of(outputs, dtype);
    by_element(p.dtype, [&](auto element) {
      using Element = decltype(element);
      launch(fed_kernel<Element>, call.row_blocks(ceil_div(p.steps * p.batch * outputs, 32)), kRowThreads, 0,
             call.stream(), p, static_cast<Element*>(data_of(fed)));
    });
    multiply_into(grad_w_hh, transposed(grad_hh), fed);
  }
  if (needed(3, b_ih)) sum_into(grad_b_ih, norm ? *to_gates : grad_ih);
  if (needed(4, b_hh)) sum_into(grad_b_hh, norm ? *to_gates : grad_hh);
  if (needed(5, w_hr)) multiply_into(grad_w_hr, transposed(*grad_hidden), *hidden);
  if (norm) {
    Tensor saved = call.matrix(gates);
    const auto hats = [&](int64_t first) { return torch::stable::narrow(saved, 1, first * units, 4 * units); };
    if (needed(8, norm_ih)) weighted_into(grad_norm_ih, *to_gates, hats(4));
    if (needed(9, norm_hh)) weighted_into(grad_norm_hh, *to_gates, hats(8));
    if (needed(10, norm_c)) weighted_into(grad_norm_c, *behind_norm, *c_hat);
    if (needed(11, norm_c_bias)) sum_into(grad_norm_c_bias, *behind_norm);
  }
  return results;
}

}  // namespace
}  // namespace fastgen

FASTGEN_CUDA_OPS(m) {
  m.impl("recurrent", TORCH_BOX(&fastgen::recurrent));
  m.impl("recurrent_backward", TORCH_BOX(&fastgen::recurrent_backward));
}
