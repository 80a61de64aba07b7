// A recurrent sequence in double precision: for each step the products by PyTorch, over the rows that it has, and a
// kernel for the cells, with layer norm a warp a row. All memory is of doubles, and the states stand where their last
// values are asked for. See recurrent.cu and, for what a step does, the kernels for the other dtypes.
#pragma once

#include "recurrent_rows.inl"

namespace fastgen {
namespace {

struct DoubleForwardParams : Sequence<RecurrentParams> {
  const double* from_input;  // [rows][G H]: W_ih x; with layer norm standardised
  double* from_state;        // [batch][G H]: W_hh h; with layer norm c' and o take the places of i and o
  double* fed;               // [batch][P]: h times the mask; null without one
  double* hidden;            // [batch][H]: o tanh(c'), null without a projection; and
  const double* projected;   // [batch][P]: W_hr of it

  __device__ double* state() const { return static_cast<double*>(h_n); }
  __device__ double* cell() const { return static_cast<double*>(c_n); }
};

struct DoubleBackwardParams : Sequence<RecurrentBackwardParams> {
  double *state, *cell;                    // [batch][P], [batch][H]: gradients that come past the products
  const double* returned;                  // [batch][P]: those that come through W_hh, before the mask
  double* operand;                         // [batch][G H]: of W_hh h of a step, which the product takes
  double *grad_gates_ih, *grad_gates_hh;   // [rows][G H]: of W_ih x and W_hh h of all steps
  double* behind;                          // [batch][P]: of h' where the cell is another kernel's: behind a projection,
  const double* in_front;                  // [batch][H]: which has this in front of it, or with layer norm the same
  double *to_gates, *behind_norm, *c_hat;  // with layer norm, of all steps: as of BackwardParams
};

__device__ inline double share_of(double probability, const Zone& zone, const int64_t* seed_offset, int64_t element) {
  return seed_offset == nullptr ? probability : double(zone_at(zone, seed_offset, uint64_t(element)));
}

// body(b, u), over a grid.
template <class Body>
__device__ void for_elements(int64_t rows, int64_t width, const Body& body) {
  const int64_t stride = int64_t(gridDim.x) * kRowThreads;
  for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < rows * width; i += stride) {
    body(i / width, i % width);
  }
}

// Elements of operands that need not be there become states.
__device__ inline void begin(double* state, const void* from, int64_t rows, int64_t width) {
  for_elements(rows, width,
               [&](int64_t b, int64_t u) { state[b * width + u] = value_of<double>(from, b * width + u); });
}

__global__ void __launch_bounds__(kRowThreads) double_begin_kernel(DoubleForwardParams p) {
  begin(p.state(), p.h_0, p.batch, p.output_size);
  if (p.mode == CellMode::kLstm) begin(p.cell(), p.c_0, p.batch, p.hidden_size);
  if (p.fed == nullptr) return;
  for_elements(p.batch, p.output_size, [&](int64_t b, int64_t u) {
    const int64_t at = b * p.output_size + u;
    p.fed[at] = static_cast<const double*>(p.h_0)[at] * value_of<double>(p.h_mask, at, 1);
  });
}

__global__ void __launch_bounds__(kRowThreads) double_begin_backward_kernel(DoubleBackwardParams p) {
  begin(p.state, p.grad_h_n, p.batch, p.output_size);
  if (p.mode == CellMode::kLstm) begin(p.cell, p.grad_c_n, p.batch, p.hidden_size);
}

// h' becomes h, by way of zoneout.
__device__ inline void emit(const DoubleForwardParams& p, const Step& now, int64_t b, int64_t u, double h) {
  const int64_t at = b * p.output_size + u, to = row_of(p, now, b) * p.output_size + u;
  if (p.zone_h.used) {
    const double d = share_of(p.zoneout_h, p.zone_h, p.seed_offset, to);
    h = d * p.state()[at] + (1 - d) * h;
  }
  p.state()[at] = h;
  static_cast<double*>(p.output)[to] = h;
  if (p.fed != nullptr) p.fed[at] = h * value_of<double>(p.h_mask, at, 1);
}

// c' becomes c, by way of zoneout, and o tanh(c') h or what is projected to it.
__device__ inline void finish_lstm(const DoubleForwardParams& p, const Step& now, int64_t b, int64_t u, double c,
                                   double h) {
  const int64_t units = p.hidden_size, at = b * units + u, row = row_of(p, now, b);
  if (p.zone_c.used) {
    const double d = share_of(p.zoneout_c, p.zone_c, p.seed_offset, row * units + u);
    c = d * p.cell()[at] + (1 - d) * c;
  }
  p.cell()[at] = c;
  if (p.cells != nullptr) static_cast<double*>(p.cells)[row * (units + saved_scales(p)) + u] = c;
  if (p.hidden == nullptr) return emit(p, now, b, u, h);
  p.hidden[at] = h;
}

template <int kGates>
__global__ void __launch_bounds__(kRowThreads) double_cell_kernel(DoubleForwardParams p, Step now) {
  for_elements(now.rows, p.hidden_size, [&](int64_t b, int64_t u) {
    const int64_t units = p.hidden_size, row = row_of(p, now, b);
    double x[kGates], s[kGates];
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      x[g] = p.from_input[(row * kGates + g) * units + u] + value_of<double>(p.b_ih, g * units + u);
      s[g] = p.from_state[(b * kGates + g) * units + u] + value_of<double>(p.b_hh, g * units + u);
    }
    const auto cell = cell_of<kGates>(p.mode, x, s, (kGates == 4 ? p.cell() : p.state())[b * units + u]);
    if (p.gates != nullptr) {
      constexpr int kSaved = kGates > 1 ? 4 : 1;
      double* gates = static_cast<double*>(p.gates) + row * kSaved * units + u;
      FASTGEN_UNROLL
      for (int g = 0; g < kSaved; ++g) gates[g * units] = kGates > 1 ? cell.gates[g] : cell.h;
    }
    kGates == 4 ? finish_lstm(p, now, b, u, cell.c, cell.h) : emit(p, now, b, u, cell.h);
  });
}

// The cells of an LSTM with layer norm.
__global__ void __launch_bounds__(kRowThreads) double_norm_kernel(DoubleForwardParams p, Step now) {
  for_rows(now.rows, [&](int64_t b) {
    const int64_t units = p.hidden_size, row = row_of(p, now, b), lane = threadIdx.x % 32;
    double* sums = p.from_state + b * 4 * units;
    const auto of_state = mean_and_scale(4 * units, p.norm_eps, [&](int64_t j) { return sums[j]; });
    double* saved = p.gates == nullptr ? nullptr : static_cast<double*>(p.gates) + row * 12 * units;
    for (int64_t u = lane; u < units; u += 32) {
      double x[4], s[4];
      FASTGEN_UNROLL
      for (int g = 0; g < 4; ++g) {
        const int64_t at = g * units + u;
        const double hat = (sums[at] - of_state.mean) * of_state.scale;
        x[g] = p.from_input[row * 4 * units + at] * value_of<double>(p.norm_ih, at) + value_of<double>(p.b_ih, at);
        s[g] = hat * value_of<double>(p.norm_hh, at) + value_of<double>(p.b_hh, at);
        if (saved != nullptr) saved[8 * units + at] = hat;
      }
      const auto cell = cell_of<4>(p.mode, x, s, p.cell()[b * units + u]);
      FASTGEN_UNROLL
      for (int g = 0; saved != nullptr && g < 4; ++g) saved[g * units + u] = cell.gates[g];
      sums[u] = cell.c;
      sums[3 * units + u] = cell.gates[3];
    }
    if (lane == 0 && p.cells != nullptr) {
      static_cast<double*>(p.cells)[row * (units + 2) + units + 1] = of_state.scale;
    }
    const auto of_cell = mean_and_scale(units, p.norm_eps, [&](int64_t u) { return sums[u]; });
    for (int64_t u = lane; u < units; u += 32) {
      const double hat = (sums[u] - of_cell.mean) * of_cell.scale;
      const double y = hat * value_of<double>(p.norm_c, u) + value_of<double>(p.norm_c_bias, u);
      finish_lstm(p, now, b, u, sums[u], sums[3 * units + u] * tanh_of(y));
    }
  });
}

__global__ void __launch_bounds__(kRowThreads) double_emit_kernel(DoubleForwardParams p, Step now) {
  for_elements(now.rows, p.output_size,
               [&](int64_t b, int64_t u) { emit(p, now, b, u, p.projected[b * p.output_size + u]); });
}

// The gradient of c', from what h' and c give, and on to the c before.
__device__ inline double through_cell(const DoubleBackwardParams& p, int64_t row, int64_t b, int64_t u, double f,
                                      double from_h) {
  const int64_t units = p.hidden_size;
  double& carried = p.cell[b * units + u];
  const double d = p.zone_c.used ? share_of(p.zoneout_c, p.zone_c, p.seed_offset, row * units + u) : 0;
  const double from_c = carried, dc = from_h + (1 - d) * from_c;
  carried = dc * f + d * from_c;
  return dc;
}

// From the gradient of h' of one unit and row to those of the gates' sums.
template <int kGates>
__device__ void double_cell_gradients(const DoubleBackwardParams& p, const Step& now, const Step& before, int64_t b,
                                      int64_t u, double dh) {
  const int64_t units = p.hidden_size, at = b * units + u, row = row_of(p, now, b);
  const auto give = [&](const double (&from_input)[kGates], const double (&from_state)[kGates]) {
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int64_t to = (row * kGates + g) * units + u;
      p.operand[(b * kGates + g) * units + u] = from_state[g];
      p.grad_gates_hh[to] = from_state[g];
      if (kGates == 3) p.grad_gates_ih[to] = from_input[g];
    }
  };
  if constexpr (kGates == 1) {
    const void* after = p.zone_h.used ? p.gates : p.output;
    const double grads[] = {elman_gradient(p.mode, static_cast<const double*>(after)[row * units + u], dh)};
    return give(grads, grads);
  } else {
    double gates[4];
    FASTGEN_UNROLL
    for (int g = 0; g < 4; ++g) gates[g] = static_cast<const double*>(p.gates)[(row * 4 + g) * units + u];
    const void* states = kGates == 4 ? p.cells : p.output;
    const double state = b < before.rows ? static_cast<const double*>(states)[row_of(p, before, b) * units + u]
                                         : static_cast<const double*>(kGates == 4 ? p.c_0 : p.h_0)[at];
    if constexpr (kGates == 3) {
      const GruGradients grads(gates, state, dh);
      give(grads.from_input, grads.from_state);
      p.state[at] += dh * gates[1];
    } else {
      const auto [i, f, g, o] = gates;
      const double t =
          tanh_of(p.zone_c.used ? f * state + i * g : static_cast<const double*>(p.cells)[row * units + u]);
      if (p.hidden != nullptr) static_cast<double*>(p.hidden)[row * units + u] = o * t;
      const double dc = through_cell(p, row, b, u, f, dh * o * (1 - t * t));
      const LstmGradients grads(gates, state, t, dh, dc);
      give(grads.sums, grads.sums);
    }
  }
}

// Back through the cells of an LSTM with layer norm.
__global__ void __launch_bounds__(kRowThreads)
    double_norm_gradients_kernel(DoubleBackwardParams p, Step now, Step before) {
  for_rows(now.rows, [&](int64_t b) {
    const int64_t units = p.hidden_size, row = row_of(p, now, b), lane = threadIdx.x % 32;
    const auto* cells = static_cast<const double*>(p.cells);
    const auto* gates = static_cast<const double*>(p.gates) + row * 12 * units;
    double *to_gates = p.to_gates + row * 4 * units, *c_hat = p.c_hat + row * units,
           *behind = p.behind_norm + row * units;
    const auto c_before = [&](int64_t u) {
      return b < before.rows ? cells[row_of(p, before, b) * (units + 2) + u]
                             : static_cast<const double*>(p.c_0)[b * units + u];
    };
    const auto proposed = [&](int64_t u) {
      return p.zone_c.used ? gates[units + u] * c_before(u) + gates[u] * gates[2 * units + u]
                           : cells[row * (units + 2) + u];
    };
    // To c', through its norm: what the gradient has of the mean and of the standardised c' is taken out of it.
    const auto of_cell = mean_and_scale(units, p.norm_eps, proposed);
    double mean = 0, slope = 0;
    for (int64_t u = lane; u < units; u += 32) {
      const double o = gates[3 * units + u], dh = p.in_front[b * units + u], gain = value_of<double>(p.norm_c, u);
      c_hat[u] = (proposed(u) - of_cell.mean) * of_cell.scale;
      const double t = tanh_of(c_hat[u] * gain + value_of<double>(p.norm_c_bias, u));
      if (p.hidden != nullptr) static_cast<double*>(p.hidden)[row * units + u] = o * t;
      behind[u] = dh * o * (1 - t * t);
      to_gates[3 * units + u] = dh * t * o * (1 - o);
      mean = mean + behind[u] * gain;
      slope = slope + behind[u] * gain * c_hat[u];
    }
    mean = warp_sum(mean) / double(units);
    slope = warp_sum(slope) / double(units);
    double gate_mean = 0, gate_slope = 0;
    for (int64_t u = lane; u < units; u += 32) {
      const double i = gates[u], f = gates[units + u], g = gates[2 * units + u];
      const double from_h = of_cell.scale * (behind[u] * value_of<double>(p.norm_c, u) - mean - c_hat[u] * slope);
      const double dc = through_cell(p, row, b, u, f, from_h);
      to_gates[u] = dc * g * i * (1 - i);
      to_gates[units + u] = dc * c_before(u) * f * (1 - f);
      to_gates[2 * units + u] = dc * i * (1 - g * g);
      for (int64_t at = u; at < 4 * units; at += units) {
        const double grad = to_gates[at] * value_of<double>(p.norm_hh, at);
        gate_mean = gate_mean + grad;
        gate_slope = gate_slope + grad * gates[8 * units + at];
      }
    }
    gate_mean = warp_sum(gate_mean) / double(4 * units);
    gate_slope = warp_sum(gate_slope) / double(4 * units);
    const double scale = cells[row * (units + 2) + units + 1];
    for (int64_t u = lane; u < units; u += 32) {
      for (int64_t at = u; at < 4 * units; at += units) {
        const double grad = to_gates[at] * value_of<double>(p.norm_hh, at);
        const double to_sum = scale * (grad - gate_mean - gates[8 * units + at] * gate_slope);
        p.operand[b * 4 * units + at] = to_sum;
        p.grad_gates_hh[row * 4 * units + at] = to_sum;
      }
    }
  });
}

// dh of the step's rows, and without projection and layer norm the rest; fed: rows of the step behind, which gave
// `returned`.
template <int kGates>
__global__ void __launch_bounds__(kRowThreads)
    double_state_kernel(DoubleBackwardParams p, Step now, Step before, int64_t fed) {
  for_elements(now.rows > fed ? now.rows : fed, p.output_size, [&](int64_t b, int64_t u) {
    const int64_t at = b * p.output_size + u;
    double dh = p.state[at];
    if (b < fed) dh = dh + p.returned[at] * value_of<double>(p.h_mask, at, 1);
    if (b >= now.rows) {  // this row has no step before
      p.state[at] = dh;
      return;
    }
    const int64_t row = row_of(p, now, b);
    const int64_t given = p.step_rows == nullptr ? now.t * p.grad_step + b * p.grad_batch : row * p.grad_batch;
    dh = dh + value_of<double>(p.grad_output, given + u);
    const double d = p.zone_h.used ? share_of(p.zoneout_h, p.zone_h, p.seed_offset, row * p.output_size + u) : 0;
    p.state[at] = d * dh;
    dh = (1 - d) * dh;
    if (p.behind == nullptr) return double_cell_gradients<kGates>(p, now, before, b, u, dh);
    p.behind[at] = dh;
    if (p.grad_hidden != nullptr) static_cast<double*>(p.grad_hidden)[row * p.output_size + u] = dh;
  });
}

__global__ void __launch_bounds__(kRowThreads) double_hidden_kernel(DoubleBackwardParams p, Step now, Step before) {
  for_elements(now.rows, p.hidden_size, [&](int64_t b, int64_t u) {
    double_cell_gradients<4>(p, now, before, b, u, p.in_front[b * p.hidden_size + u]);
  });
}

}  // namespace
}  // namespace fastgen
