// The backward pass of a recurrent sequence (see recurrent.cu): dh and the gradients of the gates, step by step.
#pragma once

#include "recurrent_sequence.h"

namespace fastgen {
namespace {

struct BackwardParams : Sequence<RecurrentBackwardParams> {
  void *grad_gates_ih, *grad_gates_hh;  // [rows][G H]: of W_ih x and W_hh h; one matrix where they do not differ
  // With layer norm:
  const float *c_hat, *c_scale;   // [rows][H], [rows]: the standardised c'
  float *to_gates, *behind_norm;  // [rows][4 H]: of the gates' sums; [rows][H]: of what the norm of c' gave
  float2 *cell_sums, *gate_sums;  // [batch][tiles]: of the gradients and of their products with what they belong to
};

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
      const Step now = step_of(p, s), before = s > 0 ? step_of(p, s - 1) : Step{};
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
    multiply<Element, 1>(
        p.recurrent, 0, fed, p.batch, [&](int64_t b, int64_t u, bool valid) { return valid ? past(b, u) : Past{}; },
        [&](int64_t b, int64_t u, bool valid, int, const float (&sums)[1], const Past& past) {
          const int64_t at = b * p.output_size + u;
          if (valid) narrow(past.h + sums[0] * past.mask, static_cast<Element*>(p.grad_h_0) + at);
        });
  }

  // dh comes from the step behind past the product with W_hh, and through it, times the mask.
  struct Past {
    float h, mask;
  };
  __device__ Past past(int64_t b, int64_t u) const {
    const int64_t at = b * p.output_size + u;
    return {p.h[at], value_of<Element>(p.h_mask, at, 1.0f)};
  }

  // fed: rows of the step behind, whose gradients of the gates stand in the other half of the operand.
  __device__ void step(const Step& now, const Step& before, int64_t fed, int64_t half) {
    struct Ahead {
      Past past;
      Element grad;
      Saved saved;
    };
    multiply<Element, 1>(
        p.recurrent, 1 - half, fed, fed < now.rows ? now.rows : fed,
        [&](int64_t b, int64_t u, bool valid) {
          Ahead ahead{};
          if (valid) ahead.past = past(b, u);
          if (valid && b < now.rows) {
            ahead.grad = grad_output(now, b, u);
            if (!projected()) ahead.saved = fetch(now, before, b, u);
          }
          return ahead;
        },
        [&](int64_t b, int64_t u, bool valid, int tile, const float (&sums)[1], const Ahead& ahead) {
          float dh = ahead.past.h + sums[0] * ahead.past.mask;
          if (valid && b >= now.rows) {
            p.h[b * p.output_size + u] = dh;  // the row begins with the step behind
            valid = false;
          }
          if (valid) dh = state(now, b, u, dh + widen(ahead.grad));
          if (!projected()) cell(now, half, b, u, valid, tile, dh, ahead.saved);
        });
    if constexpr (kLstm) {
      if (projected()) {
        barrier.wait();
        multiply<Element, 1>(
            p.projection, 0, now.rows, now.rows,
            [&](int64_t b, int64_t u, bool valid) { return valid ? fetch(now, before, b, u) : Saved{}; },
            [&](int64_t b, int64_t u, bool valid, int tile, const float (&sums)[1], const Saved& saved) {
              cell(now, half, b, u, valid, tile, sums[0], saved);
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

  __device__ Element grad_output(const Step& now, int64_t b, int64_t u) const {
    const int64_t first =
        p.step_rows == nullptr ? now.t * p.grad_step + b * p.grad_batch : row_of(p, now, b) * p.grad_batch;
    return element_of<Element>(p.grad_output, first + u);
  }

  // From the gradient of h to that of h' in front of zoneout.
  __device__ float state(const Step& now, int64_t b, int64_t u, float dh) const {
    const int64_t at = b * p.output_size + u, row = row_of(p, now, b);
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
    return b < before.rows ? value_of<Element>(p.output, row_of(p, before, b) * p.output_size + u)
                           : value_of<Element>(p.h_0, b * p.output_size + u);
  }
  __device__ float c_before(const Step& before, int64_t b, int64_t u) const {
    const int64_t width = p.hidden_size + saved_scales(p);
    return b < before.rows ? static_cast<const float*>(p.cells)[row_of(p, before, b) * width + u]
                           : value_of<Element>(p.c_0, b * p.hidden_size + u);
  }

  // What the forward pass kept of the cell of one unit and row; nothing with layer norm, which reads its own.
  struct Saved {
    Element gates[4];
    float before, after;  // c; of a GRU h, of an RNN only h'
    float dc;             // of the c after it, but for what comes from h
  };
  __device__ Saved fetch(const Step& now, const Step& before, int64_t b, int64_t u) const {
    Saved saved{};
    if (norm()) return saved;
    const int64_t units = p.hidden_size, row = row_of(p, now, b);
    if constexpr (kGates > 1) {
      const auto* gates = static_cast<const Element*>(p.gates) + row * 4 * units + u;
      FASTGEN_UNROLL
      for (int g = 0; g < 4; ++g) saved.gates[g] = gates[g * units];
    }
    if constexpr (kLstm) {
      saved.before = c_before(before, b, u);
      saved.dc = p.c[b * units + u];
      if (!p.zone_c.used) saved.after = static_cast<const float*>(p.cells)[row * units + u];
    } else if constexpr (kGru) {
      saved.before = h_before(before, b, u);
    } else {
      saved.after = value_of<Element>(p.zone_h.used ? p.gates : p.output, row * units + u);
    }
    return saved;
  }

  // The gradients of the gates' sums of one unit and row, from that of h'; the whole warp calls.
  __device__ void cell(const Step& now, int64_t half, int64_t b, int64_t u, bool valid, int tile, float dh,
                       const Saved& saved) const {
    const int64_t units = p.hidden_size, row = valid ? row_of(p, now, b) : 0;
    if constexpr (kLstm) {
      if (norm()) return behind_norm(now, row, b, u, valid, tile, dh);
    }
    if (!valid) return;
    float kept[4];
    FASTGEN_UNROLL
    for (int g = 0; g < 4; ++g) kept[g] = widen(saved.gates[g]);
    if constexpr (kLstm) {
      const auto [i, f, g, o] = kept;
      const float t = tanh_of(p.zone_c.used ? f * saved.before + i * g : saved.after);
      if (p.hidden != nullptr) narrow(o * t, static_cast<Element*>(p.hidden) + row * units + u);
      const float from_h = dh * o * (1.0f - t * t), dc = from_h + cell_gradient(row, b, u, f, from_h, saved.dc);
      const LstmGradients grads(kept, saved.before, t, dh, dc);
      give(half, row, b, u, grads.sums, grads.sums);
    } else if constexpr (kGru) {
      const GruGradients grads(kept, saved.before, dh);
      give(half, row, b, u, grads.from_input, grads.from_state);
      p.h[b * units + u] = p.h[b * units + u] + dh * kept[1];
    } else {
      const float grads[] = {elman_gradient(p.mode, saved.after, dh)};
      give(half, row, b, u, grads, grads);
    }
  }

  // The part of the gradient of c' that comes from c, which goes on to the c before with what h gave.
  __device__ float cell_gradient(int64_t row, int64_t b, int64_t u, float f, float from_h, float dc) const {
    float past = 0.0f;
    if (p.zone_c.used) {
      const float d = zone_at(p.zone_c, p.seed_offset, uint64_t(row * p.hidden_size + u));
      past = d * dc;
      dc = (1.0f - d) * dc;
    }
    p.c[b * p.hidden_size + u] = (from_h + dc) * f + past;
    return dc;
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
      const int64_t there = b < now.rows ? b : 0, row = row_of(p, now, there);
      const float2 of_row = sums_of_row(p.cell_sums + there * tiles, tiles);
      float2 sums = {0.0f, 0.0f};
      if (valid) {
        const auto* gates = static_cast<const Element*>(p.gates) + row * 12 * units + u;
        const float i = widen(gates[0]), f = widen(gates[units]), g = widen(gates[2 * units]);
        const float hat = p.c_hat[row * units + u];
        const float front = p.behind_norm[row * units + u] * value_of<Element>(p.norm_c, u);
        const float from_h = p.c_scale[row] * (front - of_row.x / float(units) - hat * (of_row.y / float(units)));
        const float dc = from_h + cell_gradient(row, b, u, f, from_h, p.c[b * units + u]);
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
      const int64_t there = b < now.rows ? b : 0, row = row_of(p, now, there);
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
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(BackwardParams p) {
  GridBarrier barrier = barrier_of(p);
  Backward<Element, kGates>(p, barrier).run();
}

}  // namespace
}  // namespace fastgen
