// fastgen::recurrent_cell, recurrent_step, their backward and linear_rows on CUDA: fastgen/reference/recurrent.py and
// generate.py.
//
// A step of few rows reads its weights once, and that is its bound: one kernel, each block of which has the gates of a
// few units, makes their products with input and state and the cells of its tile in one go. Layer norm needs whole
// rows: there the sums go to memory, and a second kernel has a block a row. Of many rows PyTorch's product is the
// faster one.
#include <algorithm>

#include "../torch/cell_ops.h"
#include "cell.h"
#include "cell_product.h"
#include "check.h"
#include "recurrent_cell.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

constexpr int kRowThreads = 256;
constexpr int64_t kFewRows = 64;  // four tiles: each reads the weights again, from L2

struct StepParams : CellParams {
  RowChoice rows;
  Term of_input, of_state;
  int input_warps;  // the first warps of a block have the input's side, the others the state's, by their shares of the
                    // sum
  int row_tiles;
  float* sums;                          // with layer norm: [rows][2][G H], of the input's side and of the state's
  const void *from_input, *from_state;  // of many rows, [batch][G H]: W_ih x and W_hh h
};

// What the cell of one unit and row needs beside the products.
template <class Element, int kGates>
struct UnitOperands {
  Element b_ih[kGates], b_hh[kGates], c, h;

  __device__ UnitOperands(const CellParams& p, int64_t b, int64_t u) {
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      b_ih[g] = element_of<Element>(p.b_ih, g * p.hidden_size + u);
      b_hh[g] = element_of<Element>(p.b_hh, g * p.hidden_size + u);
    }
    c = element_of<Element>(p.c.data, b * p.c.stride + u);
    h = element_of<Element>(p.h.data, b * p.h.stride + u);
  }
};

// d of zoneout is its probability.
__device__ inline float kept(double zoneout, float before, float after) {
  const float d = float(zoneout);
  return zoneout > 0 ? d * before + (1.0f - d) * after : after;
}

template <class Element>
__device__ void store_states(const CellParams& p, int64_t b, int64_t u, float c, float c_1, float h, float h_1) {
  const int64_t at = b * p.hidden_size + u;
  narrow(kept(p.zoneout_h, h, h_1), static_cast<Element*>(p.h_1) + at);
  if (p.c_1 != nullptr) narrow(kept(p.zoneout_c, c, c_1), static_cast<Element*>(p.c_1) + at);
}

// x, s: W_ih x and W_hh h.
template <class Element, int kGates>
__device__ void finish(const CellParams& p, int64_t b, int64_t u, float (&x)[kGates], float (&s)[kGates],
                       const UnitOperands<Element, kGates>& with) {
  FASTGEN_UNROLL
  for (int g = 0; g < kGates; ++g) {
    x[g] = x[g] + widen(with.b_ih[g]);
    s[g] = s[g] + widen(with.b_hh[g]);
  }
  const float c = widen(with.c), h = widen(with.h);
  const Cell cell = cell_of<kGates>(p.mode, x, s, kGates == 4 ? c : h);
  if (p.gates != nullptr) {
    constexpr int kKept = kGates > 1 ? 4 : 1;
    Element* gates = static_cast<Element*>(p.gates) + b * kKept * p.hidden_size + u;
    FASTGEN_UNROLL
    for (int g = 0; g < kKept; ++g) narrow(kGates > 1 ? cell.gates[g] : cell.h, gates + g * p.hidden_size);
    if (kGates == 4) static_cast<float*>(p.cells)[b * p.hidden_size + u] = cell.c;
  }
  store_states<Element>(p, b, u, c, cell.c, h, cell.h);
}

template <class Element, int kGates>
__global__ void __launch_bounds__(kTileThreads) step_kernel(StepParams p) {
  const int warp = int(threadIdx.x) / 32, unit = int(threadIdx.x) % kUnits, row = int(threadIdx.x) / kUnits;
  const int64_t first_unit = int64_t(blockIdx.x) / p.row_tiles * kUnits;
  const int64_t first_row = int64_t(blockIdx.x) % p.row_tiles * kRows;
  const int64_t left = p.batch - first_row < kRows ? p.batch - first_row : kRows;
  if (!p.rows.any_wanted(first_row, first_row + left)) return;
  const int64_t u = first_unit + unit, b = row < left ? p.rows.row(first_row + row) : 0;
  const bool valid = row < left && u < p.hidden_size;
  const UnitOperands<Element, kGates> with(p, b, valid ? u : 0);

  const bool of_input = warp < p.input_warps;
  const int state_warps = kTileWarps - p.input_warps;
  multiply_term<Element, kGates>(
      of_input ? p.of_input : p.of_state, of_input ? warp : warp - p.input_warps,
      of_input ? p.input_warps : state_warps, int(left),
      [&](int group, int unit) {
        return first_unit + unit < p.hidden_size ? group * p.hidden_size + first_unit + unit : int64_t(-1);
      },
      [&](int row) {
        if (row >= left) return int64_t(-1);
        const int64_t number = p.rows.row(first_row + row);
        return of_input && p.input.index != nullptr ? p.input.index[number] : number;
      });
  block_barrier();
  if (!valid) return;
  float x[kGates], s[kGates];
  FASTGEN_UNROLL
  for (int g = 0; g < kGates; ++g) {
    x[g] = tile_sum<kGates>(0, p.input_warps, g, unit, row);
    s[g] = tile_sum<kGates>(p.input_warps, state_warps, g, unit, row);
  }
  if (p.sums == nullptr) return finish<Element, kGates>(p, b, u, x, s, with);
  float* sums = p.sums + b * 2 * kGates * p.hidden_size + u;
  FASTGEN_UNROLL
  for (int g = 0; g < kGates; ++g) {
    sums[g * p.hidden_size] = x[g];
    sums[(kGates + g) * p.hidden_size] = s[g];
  }
}

// body(b, u) for the rows and units of a step, over a grid.
template <class Body>
__device__ void for_units(int64_t batch, int64_t units, const Body& body) {
  const int64_t stride = int64_t(gridDim.x) * kRowThreads;
  for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < batch * units; i += stride) {
    body(i / units, i % units);
  }
}

// The cells of many rows.
template <class Element, int kGates>
__global__ void __launch_bounds__(kRowThreads) cells_of_products_kernel(StepParams p) {
  for_units(p.batch, p.hidden_size, [&](int64_t b, int64_t u) {
    float x[kGates], s[kGates];
    FASTGEN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int64_t at = (b * kGates + g) * p.hidden_size + u;
      x[g] = value_of<Element>(p.from_input, at);
      s[g] = value_of<Element>(p.from_state, at);
    }
    finish<Element, kGates>(p, b, u, x, s, UnitOperands<Element, kGates>(p, b, u));
  });
}

// Over a block of kRowThreads.
__device__ inline float block_sum(float x) {
  auto* parts = reinterpret_cast<float*>(dynamic_shared());
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  block_barrier();
  float sum = 0.0f;
  for (int i = 0; i < kRowThreads / 32; ++i) sum = sum + parts[i];
  block_barrier();
  return sum;
}

// The mean of a row, and 1 / sqrt(variance + eps).
__device__ inline float2 moments_of(const float* row, int64_t width, double eps) {
  float sum = 0.0f, squares = 0.0f;
  for (int64_t j = threadIdx.x; j < width; j += kRowThreads) sum = sum + row[j];
  const float mean = block_sum(sum) / float(width);
  for (int64_t j = threadIdx.x; j < width; j += kRowThreads) {
    const float away = row[j] - mean;
    squares = squares + away * away;
  }
  return {mean, 1.0f / square_root(block_sum(squares) / float(width) + float(eps))};
}

// The cells of an LSTM with layer norm, a row of the batch a block.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) norm_kernel(StepParams p) {
  const int64_t b = p.rows.row(blockIdx.x), units = p.hidden_size;
  if (!p.rows.wanted(b)) return;
  float *from_input = p.sums + b * 8 * units, *from_state = from_input + 4 * units;
  const float2 of_input = moments_of(from_input, 4 * units, p.norm_eps),
               of_state = moments_of(from_state, 4 * units, p.norm_eps);
  // c' and o take the places of the sums of i of their unit.
  for (int64_t u = threadIdx.x; u < units; u += kRowThreads) {
    const UnitOperands<Element, 4> with(p, b, u);
    float x[4], s[4];
    FASTGEN_UNROLL
    for (int g = 0; g < 4; ++g) {
      const int64_t at = g * units + u;
      x[g] = (from_input[at] - of_input.x) * of_input.y * value_of<Element>(p.norm_ih, at) + widen(with.b_ih[g]);
      s[g] = (from_state[at] - of_state.x) * of_state.y * value_of<Element>(p.norm_hh, at) + widen(with.b_hh[g]);
    }
    const Cell cell = cell_of<4>(p.mode, x, s, widen(with.c));
    from_input[u] = cell.c;
    from_state[u] = cell.gates[3];
  }
  block_barrier();
  const float2 of_cell = moments_of(from_input, units, p.norm_eps);
  for (int64_t u = threadIdx.x; u < units; u += kRowThreads) {
    const float c_1 = from_input[u];
    const float y =
        (c_1 - of_cell.x) * of_cell.y * value_of<Element>(p.norm_c, u) + value_of<Element>(p.norm_c_bias, u);
    store_states<Element>(p, b, u, value_of<Element>(p.c.data, b * p.c.stride + u), c_1,
                          value_of<Element>(p.h.data, b * p.h.stride + u), from_state[u] * tanh_of(y));
  }
}

template <class Element, int kGates>
__global__ void __launch_bounds__(kRowThreads) cell_backward_kernel(CellBackwardParams p) {
  for_units(p.batch, p.hidden_size, [&](int64_t b, int64_t u) {
    const int64_t units = p.hidden_size, at = b * units + u;
    const float dh = value_of<Element>(p.grad_h_1, at);
    auto *from_input = static_cast<Element*>(p.to_gates_ih) + b * kGates * units + u,
         *from_state = static_cast<Element*>(p.to_gates_hh) + b * kGates * units + u;
    float gates[4];
    FASTGEN_UNROLL
    for (int g = 0; kGates > 1 && g < 4; ++g) gates[g] = value_of<Element>(p.gates, (4 * b + g) * units + u);
    if constexpr (kGates == 4) {
      const float t = tanh_of(static_cast<const float*>(p.cells)[at]);
      const float dc = value_of<Element>(p.grad_c_1, at) + dh * gates[3] * (1.0f - t * t);
      const LstmGradients grads(gates, value_of<Element>(p.c, at), t, dh, dc);
      FASTGEN_UNROLL
      for (int g = 0; g < 4; ++g) narrow(grads.sums[g], from_input + g * units);
      if (p.grad_c != nullptr) narrow(dc * gates[1], static_cast<Element*>(p.grad_c) + at);
    } else if constexpr (kGates == 3) {
      const GruGradients grads(gates, value_of<Element>(p.h.data, b * p.h.stride + u), dh);
      FASTGEN_UNROLL
      for (int g = 0; g < 3; ++g) {
        narrow(grads.from_input[g], from_input + g * units);
        narrow(grads.from_state[g], from_state + g * units);
      }
    } else {
      narrow(elman_gradient(p.mode, value_of<Element>(p.gates, at), dh), from_input);
    }
  });
}

// Of a GRU: what reaches h past the product, z dh, is added to it.
template <class Element>
__global__ void __launch_bounds__(kRowThreads) direct_kernel(CellBackwardParams p, void* grad_h) {
  for_units(p.batch, p.hidden_size, [&](int64_t b, int64_t u) {
    const int64_t at = b * p.hidden_size + u;
    auto* to = static_cast<Element*>(grad_h) + at;
    const float update = value_of<Element>(p.gates, (4 * b + 1) * p.hidden_size + u);
    narrow(value_of<Element>(grad_h, at) + value_of<Element>(p.grad_h_1, at) * update, to);
  });
}

constexpr int kOutputGroups = 4;  // of kUnits outputs

struct LinearParams : LinearRowsParams {
  RowChoice rows;
  Term term;
  int row_tiles;
};

template <class Element>
__global__ void __launch_bounds__(kTileThreads) linear_rows_kernel(LinearParams p) {
  const int warp = int(threadIdx.x) / 32, unit = int(threadIdx.x) % kUnits, row = int(threadIdx.x) / kUnits;
  const int64_t first_output = int64_t(blockIdx.x) / p.row_tiles * (kOutputGroups * kUnits);
  const int64_t first_row = int64_t(blockIdx.x) % p.row_tiles * kRows;
  const int64_t left = p.batch - first_row < kRows ? p.batch - first_row : kRows;
  if (!p.rows.any_wanted(first_row, first_row + left)) return;
  const auto output = [&](int group, int unit) {
    const int64_t number = first_output + group * kUnits + unit;
    return number < p.outputs ? number : int64_t(-1);
  };
  multiply_term<Element, kOutputGroups>(p.term, warp, kTileWarps, int(left), output, [&](int row) {
    return row < left ? p.rows.row(first_row + row) : int64_t(-1);
  });
  block_barrier();
  if (row >= left) return;
  const int64_t b = p.rows.row(first_row + row);
  for (int group = 0; group < kOutputGroups; ++group) {
    const int64_t n = output(group, unit);
    if (n < 0) return;
    const float sum = tile_sum<kOutputGroups>(0, kTileWarps, group, unit, row) + value_of<Element>(p.bias, n);
    narrow(sum, static_cast<Element*>(p.y) + b * p.outputs + n);
  }
}

// ---------------------------------------------------------------------------------------------------
// Launches

// Whether the kernels take a call; the rest goes to the reference.
bool takes(const Tensor& tensor) { return tensor.scalar_type() != ScalarType::Double; }

unsigned unit_blocks(int64_t elements) {
  return unsigned(std::min<int64_t>(ceil_div(elements, kRowThreads), 16 * multiprocessors()));
}

void run_step(const CellParams& p, const Tensor& like) {
  const OnDevice device(like);
  Optional sums;
  if (p.norm_ih != nullptr) {
    const int64_t sizes[] = {p.batch, 2 * gate_count(p.mode) * p.hidden_size};
    sums = torch::stable::new_empty(like, {sizes, 2}, ScalarType::Float);
  }
  launch_step(p, {}, sums ? static_cast<float*>(data_of(*sums)) : nullptr, current_stream(like));
}

// The products by PyTorch, rounded to the dtype of the operands, and a kernel for the cells.
void run_products(const CellParams& params, const Tensor& input, const Tensor& h, const Tensor& w_ih,
                  const Tensor& w_hh) {
  const OnDevice device(input);
  StepParams p{};
  static_cast<CellParams&>(p) = params;
  const auto product = [&](const Tensor& rows, const Tensor& weights) {
    Tensor out = empty_matrix<Cuda>(input, p.batch, weights.size(0));
    multiply_into(out, detached(rows), transposed(detached(weights)));
    return out;
  };
  const Tensor from_input = product(input, w_ih), from_state = product(h, w_hh);
  p.from_input = data_of(from_input);
  p.from_state = data_of(from_state);
  by_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    by_gates(p.mode, [&](auto gates) {
      launch(cells_of_products_kernel<Element, decltype(gates)::value>, unit_blocks(p.batch * p.hidden_size),
             kRowThreads, 0, current_stream(input), p);
    });
  });
}

using CellResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;
CellResults recurrent_cell(int64_t mode, const Tensor& input, const Tensor& h, const Optional& c, const Tensor& w_ih,
                           const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, bool save) {
  if (!takes(input)) {
    return plain<CellResults>("fastgen::recurrent_cell", mode, input, h, c, w_ih, w_hh, b_ih, b_hh, save);
  }
  CellArguments<Cuda> arguments(mode, input, h, c, w_ih, w_hh, b_ih, b_hh, save);
  if (!arguments.empty() && arguments.p.batch > kFewRows) {
    run_products(arguments.p, input, h, w_ih, w_hh);
  } else if (!arguments.empty()) {
    run_step(arguments.p, input);
  }
  return {*arguments.h_1, *arguments.c_1, *arguments.gates, *arguments.cells};
}

using StepResults = std::tuple<Tensor, Tensor>;
StepResults recurrent_step(int64_t mode, const Tensor& input, const Tensor& h, const Optional& c, const Tensor& w_ih,
                           const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, const Optional& norm_ih,
                           const Optional& norm_hh, const Optional& norm_c, const Optional& norm_c_bias,
                           double norm_eps, double zoneout_c, double zoneout_h) {
  if (!takes(input)) {
    return plain<StepResults>("fastgen::recurrent_step", mode, input, h, c, w_ih, w_hh, b_ih, b_hh, norm_ih, norm_hh,
                              norm_c, norm_c_bias, norm_eps, zoneout_c, zoneout_h);
  }
  CellArguments<Cuda> arguments(mode, input, h, c, w_ih, w_hh, b_ih, b_hh, false);
  arguments.set(norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps, zoneout_c, zoneout_h);
  if (!arguments.empty()) run_step(arguments.p, input);
  return {*arguments.h_1, *arguments.c_1};
}

// A kernel for the gradients of the sums before the gates, and PyTorch's products with them.
using CellGradients = CellBackwardArguments<Cuda>::Results;
CellGradients recurrent_cell_backward(int64_t mode, const Optional& grad_h_1, const Optional& grad_c_1,
                                      const Tensor& input, const Tensor& h, const Optional& c, const Tensor& w_ih,
                                      const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                                      const Tensor& gates, const Tensor& cells, int64_t needs) {
  if (!takes(input)) {
    return plain<CellGradients>("fastgen::recurrent_cell_backward", mode, grad_h_1, grad_c_1, input, h, c, w_ih, w_hh,
                                b_ih, b_hh, gates, cells, needs);
  }
  CellBackwardArguments<Cuda> arguments(mode, grad_h_1, grad_c_1, input, h, c, w_ih, w_hh, b_ih, b_hh, gates, cells,
                                        needs);
  if (arguments.empty()) return *arguments.results;
  CellBackwardParams& p = arguments.p;
  const OnDevice device(input);
  const int64_t columns = gate_count(p.mode) * p.hidden_size;
  const Tensor grad_ih = empty_matrix<Cuda>(input, p.batch, columns);
  const Tensor grad_hh = p.mode == CellMode::kGru ? empty_matrix<Cuda>(input, p.batch, columns) : grad_ih;
  p.to_gates_ih = data_of(grad_ih);
  p.to_gates_hh = data_of(grad_hh);
  const unsigned blocks = unit_blocks(p.batch * p.hidden_size);
  const cudaStream_t stream = current_stream(input);
  by_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    by_gates(p.mode, [&](auto gates) {
      launch(cell_backward_kernel<Element, decltype(gates)::value>, blocks, kRowThreads, 0, stream, p);
    });
  });
  auto& [to_input, to_h, to_c, to_w_ih, to_w_hh, to_b_ih, to_b_hh] = *arguments.results;
  const auto wanted = [&](int i) { return arguments.grads[i] != nullptr; };
  if (wanted(0)) multiply_into(to_input, grad_ih, detached(w_ih));
  if (wanted(1)) multiply_into(to_h, grad_hh, detached(w_hh));
  if (wanted(1) && p.mode == CellMode::kGru) {
    by_element(p.dtype, [&](auto element) {
      launch(direct_kernel<decltype(element)>, blocks, kRowThreads, 0, stream, p, arguments.grads[1]);
    });
  }
  if (wanted(3)) multiply_into(to_w_ih, transposed(grad_ih), detached(input));
  if (wanted(4)) multiply_into(to_w_hh, transposed(grad_hh), detached(h));
  if (wanted(5)) sum_rows_into(to_b_ih, grad_ih);
  if (wanted(6)) sum_rows_into(to_b_hh, grad_hh);
  return *arguments.results;
}

Tensor linear_rows(const Tensor& input, const Tensor& weight, const Optional& bias) {
  if (!takes(input)) return plain<Tensor>("fastgen::linear_rows", input, weight, bias);
  const LinearRowsArguments<Cuda> arguments(input, weight, bias);
  if (arguments.empty()) return *arguments.output;
  const OnDevice device(input);
  launch_linear_rows(arguments.p, {}, current_stream(input));
  return *arguments.output;
}

}  // namespace

// One kernel for everything; with layer norm two. A row's results do not depend on the others.
void launch_step(const CellParams& params, const RowChoice& rows, float* sums, cudaStream_t stream) {
  StepParams p{};
  static_cast<CellParams&>(p) = params;
  p.rows = rows;
  p.sums = sums;
  // A warp each at least, as a side of zero width has sums too.
  const double share = double(p.input_size) / double(p.input_size + p.state_size);
  p.input_warps = std::clamp(int(share * kTileWarps + 0.5), 1, kTileWarps - 1);
  p.row_tiles = int(ceil_div(p.batch, kRows));
  const auto blocks = unsigned(ceil_div(p.hidden_size, kUnits) * p.row_tiles);
  by_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    p.of_input = {{p.w_ih, p.input_size, sizeof(Element)}, {p.input, p.input_size, sizeof(Element)}};
    p.of_state = {{p.w_hh, p.state_size, sizeof(Element)}, {p.h, p.state_size, sizeof(Element)}};
    by_gates(p.mode, [&](auto gates) {
      constexpr int kGates = decltype(gates)::value;
      launch(step_kernel<Element, kGates>, blocks, kTileThreads, size_t(kTileBytes<kGates>), stream, p);
    });
    if (p.norm_ih == nullptr) return;
    launch(norm_kernel<Element>, unsigned(p.batch), kRowThreads, kRowThreads / 32 * sizeof(float), stream, p);
  });
}

void launch_linear_rows(const LinearRowsParams& params, const RowChoice& rows, cudaStream_t stream) {
  LinearParams p{};
  static_cast<LinearRowsParams&>(p) = params;
  p.rows = rows;
  p.row_tiles = int(ceil_div(p.batch, kRows));
  const auto blocks = unsigned(ceil_div(p.outputs, kOutputGroups * kUnits) * p.row_tiles);
  by_element(p.dtype, [&](auto element) {
    p.term = {{p.w, p.inputs, sizeof(element)}, {p.x, p.inputs, sizeof(element)}};
    launch(linear_rows_kernel<decltype(element)>, blocks, kTileThreads, size_t(kTileBytes<kOutputGroups>), stream, p);
  });
}

}  // namespace fastgen

FASTGEN_CUDA_OPS(m) {
  m.impl("recurrent_cell", TORCH_BOX(&fastgen::recurrent_cell));
  m.impl("recurrent_step", TORCH_BOX(&fastgen::recurrent_step));
  m.impl("recurrent_cell_backward", TORCH_BOX(&fastgen::recurrent_cell_backward));
  m.impl("linear_rows", TORCH_BOX(&fastgen::linear_rows));
}
