// fastgen::gelu, swiglu and their backwards on the CPU.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "memory.h"
#include "tensor.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

Tensor result_of(const Tensor& like, int64_t width) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = width;
  Tensor out = empty_cpu(sizes.data(), int64_t(sizes.size()), like.scalar_type());
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}

// The parameters of rows of `width` results; input is contiguous.
template <class Params>
Params params_of(Activation activation, const Tensor& input, const Optional& bias, int64_t width) {
  Params p{};
  p.activation = activation;
  p.dtype = p.bias_dtype = dtype_of(input.scalar_type());
  p.width = width;
  p.rows = width == 0 ? 0 : input.numel() / input.size(input.dim() - 1);
  p.input = input.const_data_ptr();
  if (bias) {
    p.bias_dtype = dtype_of(bias->scalar_type());
    p.bias = bias->const_data_ptr();
  }
  return p;
}

void check_input(const Tensor& input) {
  check_floating(input.scalar_type());
  STD_TORCH_CHECK(input.is_cpu() && input.dim() >= 1, "input: expected at least one dimension, on the CPU");
}
void check_bias(const Tensor& input, const Optional& bias) {
  if (!bias) return;
  const ScalarType type = bias->scalar_type(), dtype = input.scalar_type();
  const ScalarType work = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == input.size(input.dim() - 1) &&
                      (type == dtype || type == work),
                  "bias: expected a vector of the last size of input, ", input.size(input.dim() - 1),
                  ", in its dtype or, for half types, float32");
}
void check_grad(const Tensor& grad, const Tensor& input, int64_t width) {
  bool fits = grad.is_cpu() && grad.scalar_type() == input.scalar_type() && grad.dim() == input.dim() &&
              grad.size(grad.dim() - 1) == width;
  for (int64_t d = 0; fits && d + 1 < grad.dim(); ++d) fits = grad.size(d) == input.size(d);
  STD_TORCH_CHECK(fits, "grad: expected the shape and dtype of the result");
}
int64_t half_of(const Tensor& input) {
  const int64_t both = input.size(input.dim() - 1);
  STD_TORCH_CHECK(both % 2 == 0, "input: expected an even last size, gate and up, got ", both);
  return both / 2;
}

constexpr int64_t kGrainElements = kGrain / 4;  // an exponential and a division each

Tensor forward(Activation activation, const Tensor& input, const Optional& bias, int64_t width) {
  const Tensor out = result_of(input, width);
  const Tensor x = as_contiguous(input);
  Optional b;
  if (bias) b = as_contiguous(*bias);
  auto p = params_of<ActivationParams>(activation, x, b, width);
  p.out = out.mutable_data_ptr();
  if (p.rows == 0) return out;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / width);
  const KernelTable& table = kernels();
  const auto run = [&](int64_t begin, int64_t end) { table.activation(p, begin, end); };
  if (p.rows <= grain) {
    run(0, p.rows);
  } else {
    torch::stable::parallel_for(0, p.rows, grain, run);
  }
  return out;
}

void backward(ActivationBackwardParams& p) {
  if (p.rows == 0) return;
  const int64_t blocks = (p.rows + kActivationRows - 1) / kActivationRows;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kActivationRows * p.width));
  const KernelTable& table = kernels();
  const auto run = [&](int64_t begin, int64_t end) { table.activation_backward(p, begin, end); };
  if (blocks <= grain) {
    run(0, blocks);
  } else {
    torch::stable::parallel_for(0, blocks, grain, run);
  }
}

Tensor gelu(const Tensor& input, const Optional& bias, bool tanh) {
  check_input(input);
  check_bias(input, bias);
  return forward(tanh ? Activation::kGeluTanh : Activation::kGelu, input, bias, input.size(input.dim() - 1));
}

std::tuple<Tensor, Tensor> gelu_backward(const Tensor& grad, const Tensor& input, const Optional& bias, bool tanh) {
  check_input(input);
  check_bias(input, bias);
  const int64_t width = input.size(input.dim() - 1);
  check_grad(grad, input, width);
  const Tensor dy = as_contiguous(grad), x = as_contiguous(input);
  Optional b;
  if (bias) b = as_contiguous(*bias);
  const Tensor grad_input = result_of(input, width);
  const int64_t bias_size = bias ? width : 0;
  const Tensor grad_bias = empty_cpu(&bias_size, 1, bias ? bias->scalar_type() : input.scalar_type());
  auto p = params_of<ActivationBackwardParams>(tanh ? Activation::kGeluTanh : Activation::kGelu, x, b, width);
  p.grad = dy.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  Optional sums;
  if (bias) {
    const int64_t sizes[2] = {(p.rows + kActivationRows - 1) / kActivationRows, width};
    sums = empty_cpu(sizes, 2, input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    p.sums = sums->mutable_data_ptr();
    p.grad_bias = grad_bias.mutable_data_ptr();
  }
  backward(p);
  if (bias) kernels().activation_add_blocks(p, 0, width);
  return {grad_input, grad_bias};
}

Tensor swiglu(const Tensor& input) {
  check_input(input);
  return forward(Activation::kSwiglu, input, std::nullopt, half_of(input));
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& input) {
  check_input(input);
  const int64_t width = half_of(input);
  check_grad(grad, input, width);
  const Tensor dy = as_contiguous(grad), x = as_contiguous(input);
  const Tensor grad_input = result_of(input, 2 * width);
  auto p = params_of<ActivationBackwardParams>(Activation::kSwiglu, x, std::nullopt, width);
  p.grad = dy.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  backward(p);
  return grad_input;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("gelu", TORCH_BOX(&fastgen::gelu));
  m.impl("gelu_backward", TORCH_BOX(&fastgen::gelu_backward));
  m.impl("swiglu", TORCH_BOX(&fastgen::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&fastgen::swiglu_backward));
}
