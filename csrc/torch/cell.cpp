// fastgen::recurrent_cell, recurrent_step and recurrent_cell_backward on the CPU.
#include "../cpu/isa.h"
#include "cell_ops.h"
#include "cpu_rows.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> recurrent_cell(int64_t mode, const Tensor& input, const Tensor& h, const Optional& c,
                                                  const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih,
                                                  const Optional& b_hh) {
  CellArguments<Cpu> arguments(mode, input, h, c, w_ih, w_hh, b_ih, b_hh, true);
  if (!arguments.empty()) run(arguments.p, kernels());
  return {*arguments.h_1, *arguments.c_1, *arguments.gates};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_cell_backward(int64_t mode, const Optional& grad_h,
                                                                   const Optional& grad_c, const Tensor& h,
                                                                   const Optional& c, const Tensor& h_1,
                                                                   const Tensor& c_1, const Tensor& gates) {
  const CellBackwardArguments<Cpu> arguments(mode, grad_h, grad_c, h, c, h_1, c_1, gates);
  if (arguments.empty()) return *arguments.results;
  const CellBackwardParams& p = arguments.p;
  const auto step = kernels().recurrent_cell_backward;
  const int64_t grain = std::max<int64_t>(1, kGrain / (4 * p.hidden_size));
  const auto rows = [&](int64_t begin, int64_t end) { step(p, begin, end); };
  if (p.batch <= grain) {
    rows(0, p.batch);
  } else {
    torch::stable::parallel_for(0, p.batch, grain, rows);
  }
  return *arguments.results;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("recurrent_cell", TORCH_BOX(&fastgen::recurrent_cell));
  m.impl("recurrent_step", TORCH_BOX(&fastgen::recurrent_step));
  m.impl("recurrent_cell_backward", TORCH_BOX(&fastgen::recurrent_cell_backward));
}
