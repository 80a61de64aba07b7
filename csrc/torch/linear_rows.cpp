// fastgen::linear_rows and its backward on the CPU.
#include "../cpu/isa.h"
#include "cell_ops.h"
#include "cpu_rows.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

Tensor linear_rows(const Tensor& input, const Tensor& weight, const Optional& bias) {
  const LinearRowsArguments<Cpu> arguments(input, weight, bias);
  if (!arguments.empty()) run(arguments.p, kernels());
  return *arguments.output;
}

std::tuple<Tensor, Tensor, Tensor> linear_rows_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                        int64_t needs) {
  const LinearRowsBackwardArguments<Cpu> arguments(grad, input, weight, needs);
  run_backward(&arguments.p, 1, kernels());
  return *arguments.results;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&fastgen::linear_rows));
  m.impl("linear_rows_backward", TORCH_BOX(&fastgen::linear_rows_backward));
}
