// The forward pass of a recurrent sequence, or of several of which each is fed by the one before (see recurrent.cu).
#pragma once

#include "recurrent_sequence.h"

namespace fastgen {
namespace {

struct ForwardParams : Sequence<RecurrentParams> {
  const void* from_input;  // [rows][G H]: W_ih x; with layer norm standardised
  // With layer norm:
  float* sums;                          // [batch][4 H]: W_hh h, and at the place of o the gate itself
  float* proposed;                      // [batch][H]: c' before zoneout
  float2 *gate_moments, *cell_moments;  // [batch][tiles]
  // With a layer above:
  unsigned char* above;      // the side of its operand that this layer writes, as `below` of its product
  void* passed;              // [rows][H]: h after dropout, or null
  Zone kept;                 // what dropout keeps, drawn by
  const int64_t* drop_seed;  // these numbers
  float kept_scale;
};

// Layers that run at once: layer l makes step s while layer l + 1 makes step s - 1. A block has as many neighbouring
// ones as there are for a stage. Layers beside others have no layer norm and no projection; all but the first have a
// product of two sides and no from_input.
template <int kLayers>
struct Layers {
  ForwardParams layer[kLayers];
  int count;

  FASTGEN_MEMBER int of_stage() const { return (count + layer[0].stages - 1) / layer[0].stages; }
};
constexpr int kLayersMost = 4;  // whose parameters fit in the 4 KB of a launch
static_assert(sizeof(Layers<kLayersMost>) <= 4096);

// kBeside: whether other layers may run beside this one.
template <class Element, int kGates, bool kBeside>
struct Forward : Worker<ForwardParams> {
  static constexpr bool kLstm = kGates == 4;
  static constexpr int kSides = kBeside ? 2 : 1;
  using Worker<ForwardParams>::Worker;

  __device__ bool norm() const { return kLstm && !kBeside && p.norm_ih != nullptr; }
  __device__ bool projected() const { return kLstm && !kBeside && p.w_hr != nullptr; }
  __device__ const Product& last() const { return projected() ? p.projection : p.recurrent; }

  __device__ void begin() const {
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
  }

  __device__ void end() const {
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

  __device__ void step(int64_t s) {
    const Step now = step_of(p, s);
    const int64_t units = p.hidden_size, half = s & 1;
    multiply<Element, kGates, kSides>(
        p.recurrent, half, now.rows, now.rows,
        [&](int64_t b, int64_t u, bool valid) { return valid && !norm() ? fetch(now, b, u) : Ahead{}; },
        [&](int64_t b, int64_t u, bool valid, int tile, const float (&sums)[kSides* kGates], const Ahead& ahead) {
          if (norm()) {
            for (int g = 0; valid && g < kGates; ++g) p.sums[b * kGates * units + g * units + u] = sums[g];
            const float2 moments = moments_of_tile(sums, units_of(p.recurrent, tile), valid);
            if (unit == 0 && b < now.rows) p.gate_moments[b * p.recurrent.tiles + tile] = moments;
          } else if (valid) {
            cell(now, half, b, u, sums, ahead);
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
        multiply<Element, 1>(
            p.projection, 0, now.rows, now.rows, [](int64_t, int64_t, bool) { return 0; },
            [&](int64_t b, int64_t u, bool valid, int, const float (&sums)[1], int) {
              if (valid) emit(now, half, b, u, sums[0]);
            });
      }
    }
  }

  // What the cell of one unit and row needs beside its sums.
  struct Ahead {
    Element x[kGates], b_ih[kGates], b_hh[kGates];
    float before;  // c; or, of a GRU, h
  };
  __device__ Ahead fetch(const Step& now, int64_t b, int64_t u) const {
    const int64_t units = p.hidden_size, row = row_of(p, now, b);
    Ahead ahead;
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int64_t at = g * units + u;
      ahead.x[g] = element_of<Element>(p.from_input, row * kGates * units + at);
      ahead.b_ih[g] = element_of<Element>(p.b_ih, at);
      ahead.b_hh[g] = element_of<Element>(p.b_hh, at);
    }
    ahead.before = (kLstm ? p.c : p.h)[b * units + u];
    return ahead;
  }

  // The cell of one unit and row.
  __device__ void cell(const Step& now, int64_t half, int64_t b, int64_t u, const float (&sums)[kSides * kGates],
                       const Ahead& ahead) const {
    const int64_t units = p.hidden_size, row = row_of(p, now, b);
    float x[kGates], s[kGates];
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      x[g] = widen(ahead.x[g]) + widen(ahead.b_ih[g]);
      if constexpr (kBeside) x[g] = x[g] + sums[kGates + g];
      s[g] = sums[g] + widen(ahead.b_hh[g]);
    }
    const Cell cell = cell_of<kGates>(p.mode, x, s, ahead.before);
    Element* gates = p.gates == nullptr ? nullptr : static_cast<Element*>(p.gates) + row * saved_gates(p) * units + u;
    if constexpr (kGates > 1) {
      save(gates, cell.gates);
    } else {
      if (gates != nullptr) narrow(cell.h, gates);
    }
    if constexpr (kLstm) {
      keep_cell(row, b, u, cell.c);
      emit_hidden(now, half, b, u, cell.h);
    } else {
      emit(now, half, b, u, cell.h);
    }
  }

  __device__ void save(Element* gates, const float (&values)[4]) const {
    if (gates == nullptr) return;
    FASTGEN_UNROLL
    for (int g = 0; g < 4; ++g) narrow(values[g], gates + g * p.hidden_size);
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
    const int64_t at = b * p.output_size + u, row = row_of(p, now, b);
    if (p.zone_h.used) {
      const float d = zone_at(p.zone_h, p.seed_offset, uint64_t(row * p.output_size + u));
      h = d * p.h[at] + (1.0f - d) * h;
    }
    p.h[at] = h;
    narrow(h, static_cast<Element*>(p.output) + row * p.output_size + u);
    feed(1 - half, b, u, h);
    if constexpr (kBeside) pass(half, row, b, u, h);
  }

  // What the layer above reads, beside the next step of this one. Rounded as PyTorch's ops would: h, its product with
  // the mask, and that with its scale.
  __device__ void pass(int64_t half, int64_t row, int64_t b, int64_t u, float h) const {
    const int64_t at = row * p.output_size + u;
    Element value;
    narrow(h, &value);
    if (p.kept.used) narrow(widen(value) * zone_at(p.kept, p.drop_seed, uint64_t(at)) * p.kept_scale, &value);
    if (p.passed != nullptr) static_cast<Element*>(p.passed)[at] = value;
    if (p.above != nullptr) {
      // As wide as this layer's own.
      const int64_t pitch = p.recurrent.operand_pitch();
      reinterpret_cast<Element*>(p.above + ((1 - half) * p.batch + b) * pitch)[u] = value;
    }
  }

  // Layer norm of W_hh h, and the gates and c'.
  __device__ void norm_gates(const Step& now) const {
    const int64_t units = p.hidden_size;
    const int tiles = p.recurrent.tiles;
    warps(p.recurrent, now.rows, [&](int64_t b, int64_t u, bool valid, int tile) {
      const int64_t there = b < now.rows ? b : 0, row = row_of(p, now, there);
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
        save(gates, {i, f, g, o});
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
      keep_cell(row_of(p, now, b), b, u, c);
      emit_hidden(now, half, b, u, p.sums[b * 4 * units + 3 * units + u] * tanh_of(y));
    });
  }
};

template <class Element, int kGates, int kLayers>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(Layers<kLayers> p) {
  using Layer = Forward<Element, kGates, (kLayers > 1)>;
  GridBarrier barrier = barrier_of(p.layer[0]);
  const int count = kLayers > 1 ? p.count : 1, of_stage = kLayers > 1 ? p.of_stage() : 1;
  const int first = kLayers > 1 ? int(blockIdx.x) / p.layer[0].unit_blocks % p.layer[0].stages * of_stage : 0;
  const int end = first + of_stage < count ? first + of_stage : count;
  for (int l = first; l < end; ++l) Layer(p.layer[l], barrier).begin();
  const int64_t steps = p.layer[0].steps;
  for (int64_t wave = 0; wave < steps + count - 1; ++wave) {
    barrier.wait();
    for (int l = first; l < end; ++l) {
      const int64_t s = wave - l;
      if (s >= 0 && s < steps) Layer(p.layer[l], barrier).step(s);
    }
  }
  for (int l = first; l < end; ++l) Layer(p.layer[l], barrier).end();
}

}  // namespace
}  // namespace fastgen
