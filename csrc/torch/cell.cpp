// fastgen::recurrent_cell, recurrent_step and recurrent_cell_backward on the CPU.
#include "../cpu/isa.h"
#include "cell_ops.h"
#include "cpu_rows.h"
#include "recurrent_backward.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_cell(int64_t mode, const Tensor& input, const Tensor& h,
                                                          const Optional& c, const Tensor& w_ih, const Tensor& w_hh,
                                                          const Optional& b_ih, const Optional& b_hh, bool save) {
  CellArguments<Cpu> arguments(mode, input, h, c, w_ih, w_hh, b_ih, b_hh, save);
  if (!arguments.empty()) run(arguments.p, kernels());
  return {*arguments.h_1, *arguments.c_1, *arguments.gates, *arguments.cells};
}

std::tuple<Tensor, Tensor> recurrent_step(int64_t mode, const Tensor& input, const Tensor& h, const Optional& c,
                                          const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih,
                                          const Optional& b_hh, const Optional& norm_ih, const Optional& norm_hh,
                                          const Optional& norm_c, const Optional& norm_c_bias, double norm_eps,
                                          double zoneout_c, double zoneout_h) {
  CellArguments<Cpu> arguments(mode, input, h, c, w_ih, w_hh, b_ih, b_hh, false);
  arguments.set(norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps, zoneout_c, zoneout_h);
  if (!arguments.empty()) {
    const Optional sums = sums_for(arguments.p, arguments.p.batch);
    run(arguments.p, kernels());
  }
  return {*arguments.h_1, *arguments.c_1};
}

using Gradients = CellBackwardArguments<Cpu>::Results;

// Measured: from so many rows, and so many units in all of them, packing the weights pays.
constexpr int64_t kManyRows = 64;
constexpr int64_t kManyUnits = 1 << 14;

// Of many rows: a sequence of one step, which packs the weights.
Gradients backward_of_a_sequence(int64_t mode, const Optional& grad_h_1, const Optional& grad_c_1, const Tensor& input,
                                 const Tensor& h, const Optional& c, const Tensor& w_ih, const Tensor& w_hh,
                                 const Optional& b_ih, const Optional& b_hh, const Tensor& gates, const Tensor& cells,
                                 int64_t needs) {
  constexpr int kPlaces[] = {0, 6, 7, 1, 2, 3, 4};  // of the results here among those of a sequence
  int64_t needs_there = 0;
  for (int i = 0; i < 7; ++i) needs_there |= (needs >> i & 1) << kPlaces[i];
  const auto step = [](const Tensor& rows) { return torch::stable::unsqueeze(rows, 0); };
  // For the gated cells any output will do: it is not read.
  const Tensor output = step(has_gates(mode_of(mode)) ? h : gates);
  auto found =
      recurrent_backward(mode, grad_h_1 ? Optional(step(*grad_h_1)) : std::nullopt, std::nullopt, grad_c_1, step(input),
                         std::nullopt, w_ih, w_hh, b_ih, b_hh, std::nullopt, h, c, std::nullopt, output, step(gates),
                         cells.dim() == 2 ? step(cells) : cells, false, false, needs_there, std::nullopt, std::nullopt,
                         std::nullopt, std::nullopt, std::nullopt, 0, 0, 0);
  const Tensor& to_input = std::get<0>(found);
  return {needs & 1 ? torch::stable::squeeze(to_input, 0) : to_input,
          std::get<6>(found),
          std::get<7>(found),
          std::get<1>(found),
          std::get<2>(found),
          std::get<3>(found),
          std::get<4>(found)};
}

Gradients recurrent_cell_backward(int64_t mode, const Optional& grad_h_1, const Optional& grad_c_1, const Tensor& input,
                                  const Tensor& h, const Optional& c, const Tensor& w_ih, const Tensor& w_hh,
                                  const Optional& b_ih, const Optional& b_hh, const Tensor& gates, const Tensor& cells,
                                  int64_t needs) {
  const int64_t rows = h.dim() == 2 ? h.size(0) : 0;
  if (rows >= kManyRows && rows * h.size(1) >= kManyUnits) {
    return backward_of_a_sequence(mode, grad_h_1, grad_c_1, input, h, c, w_ih, w_hh, b_ih, b_hh, gates, cells, needs);
  }
  CellBackwardArguments<Cpu> arguments(mode, grad_h_1, grad_c_1, input, h, c, w_ih, w_hh, b_ih, b_hh, gates, cells,
                                       needs);
  if (arguments.empty()) return *arguments.results;
  CellBackwardParams& p = arguments.p;
  const bool gru = p.mode == CellMode::kGru;
  const int64_t gates_size = p.batch * gate_count(p.mode) * p.hidden_size;
  const int64_t size = gru ? 2 * gates_size + p.batch * p.hidden_size : gates_size;
  const Tensor sums = empty_cpu(&size, 1, work_dtype_of(input.scalar_type()));
  const auto at = [&](int64_t element) {
    return static_cast<char*>(sums.mutable_data_ptr()) + element * int64_t(sums.element_size());
  };
  p.to_gates_ih = at(0);
  p.to_gates_hh = gru ? at(gates_size) : p.to_gates_ih;
  p.direct = gru ? at(2 * gates_size) : nullptr;
  const KernelTable& table = kernels();
  table.recurrent_cell_backward(p, 0, p.batch);

  const auto side = [&](const void* to_gates, int64_t width, const RowsOperand& x, const RowsOperand& w, int first) {
    LinearRowsBackwardParams out{};
    out.dtype = p.dtype;
    out.batch = p.batch;
    out.inputs = width;
    out.outputs = gate_count(p.mode) * p.hidden_size;
    out.grad_y = to_gates;
    out.x = x;
    out.w = w;
    out.grad_x = arguments.grads[first];
    out.grad_w = arguments.grads[first + 3];
    out.grad_bias = arguments.grads[first + 5];
    return out;
  };
  LinearRowsBackwardParams sides[] = {side(p.to_gates_ih, arguments.input_size, arguments.input, arguments.w_ih, 0),
                                      side(p.to_gates_hh, p.hidden_size, p.h, arguments.w_hh, 1)};
  sides[1].direct = p.direct;
  run_backward(sides, 2, table);
  return *arguments.results;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("recurrent_cell", TORCH_BOX(&fastgen::recurrent_cell));
  m.impl("recurrent_step", TORCH_BOX(&fastgen::recurrent_step));
  m.impl("recurrent_cell_backward", TORCH_BOX(&fastgen::recurrent_cell_backward));
}
