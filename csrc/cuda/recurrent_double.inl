// A recurrent sequence in double precision, without layer norm: for each step the products by PyTorch, over the rows
// that it has, and a kernel for the cells. All memory is of doubles, and the states stand where their last values are
// asked for. See recurrent.cu and, for what a step does, the kernels for the other dtypes.
#pragma once

#include "recurrent_rows.inl"

namespace fastgen {
namespace {

struct DoubleForwardParams : Sequence<RecurrentParams> {
  const double *from_input, *from_state;  // [rows][G H]: W_ih x; [batch][G H]: W_hh h
  double* fed;                            // [batch][P]: h times the mask; null without one
  double* hidden;                         // [batch][H]: o tanh(c'), null without a projection; and
  const double* projected;                // [batch][P]: W_hr of it

  __device__ double* state() const { return static_cast<double*>(h_n); }
  __device__ double* cell() const { return static_cast<double*>(c_n); }
};

struct DoubleBackwardParams : Sequence<RecurrentBackwardParams> {
  double *state, *cell;                   // [batch][P], [batch][H]: gradients that come past the products
  const double* returned;                 // [batch][P]: those that come through W_hh, before the mask
  double* to_gates;                       // [batch][G H]: of the gates' sums of a step, as W_hh takes them
  double *grad_gates_ih, *grad_gates_hh;  // [rows][G H]: of all steps
  double* behind;                         // [batch][P]: of the projection, null without one; and
  const double* in_front;                 // [batch][H]: of o tanh(c')
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

template <int kGates>
__global__ void __launch_bounds__(kRowThreads) double_cell_kernel(DoubleForwardParams p, Step now) {
  for_elements(now.rows, p.hidden_size, [&](int64_t b, int64_t u) {
    const int64_t units = p.hidden_size, at = b * units + u, row = row_of(p, now, b);
    double x[kGates], s[kGates];
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      x[g] = p.from_input[(row * kGates + g) * units + u] + value_of<double>(p.b_ih, g * units + u);
      s[g] = p.from_state[(b * kGates + g) * units + u] + value_of<double>(p.b_hh, g * units + u);
    }
    const auto cell = cell_of<kGates>(p.mode, x, s, (kGates == 4 ? p.cell() : p.state())[at]);
    if (p.gates != nullptr) {
      constexpr int kSaved = kGates > 1 ? 4 : 1;
      double* gates = static_cast<double*>(p.gates) + row * kSaved * units + u;
      FASTGEN_UNROLL
      for (int g = 0; g < kSaved; ++g) gates[g * units] = kGates > 1 ? cell.gates[g] : cell.h;
    }
    if constexpr (kGates == 4) {
      const double d = p.zone_c.used ? share_of(p.zoneout_c, p.zone_c, p.seed_offset, row * units + u) : 0;
      const double c = p.zone_c.used ? d * p.cell()[at] + (1 - d) * cell.c : cell.c;
      p.cell()[at] = c;
      if (p.cells != nullptr) static_cast<double*>(p.cells)[row * units + u] = c;
      if (p.hidden != nullptr) {
        p.hidden[at] = cell.h;
        return;
      }
    }
    emit(p, now, b, u, cell.h);
  });
}

__global__ void __launch_bounds__(kRowThreads) double_emit_kernel(DoubleForwardParams p, Step now) {
  for_elements(now.rows, p.output_size,
               [&](int64_t b, int64_t u) { emit(p, now, b, u, p.projected[b * p.output_size + u]); });
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
      p.to_gates[(b * kGates + g) * units + u] = from_state[g];
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
      const double d = p.zone_c.used ? share_of(p.zoneout_c, p.zone_c, p.seed_offset, row * units + u) : 0;
      const double from_c = p.cell[at], dc = dh * o * (1 - t * t) + (1 - d) * from_c;
      p.cell[at] = dc * f + d * from_c;
      const LstmGradients grads(gates, state, t, dh, dc);
      give(grads.sums, grads.sums);
    }
  }
}

// dh of the step's rows, and without projection the rest; fed: rows of the step behind, which gave `returned`.
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
