// fastgen::recurrent_cell and recurrent_cell_backward on the CPU.
#include <tuple>

#include "../cpu/isa.h"
#include "rows.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns};
  return empty_cpu(sizes, 2, dtype);
}

Tensor nothing(ScalarType dtype) {
  const int64_t none = 0;
  return empty_cpu(&none, 1, dtype);
}

// The operands of a step, checked; holds the copies that their strides asked for.
class Operands {
 public:
  CellParams p{};

  Operands(int64_t mode_number, const Tensor& input, const Tensor& h, const Optional& c, const Tensor& w_ih,
           const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh)
      : lstm(mode_of(mode_number) == CellMode::kLstm), dtype(input.scalar_type()) {
    p.mode = CellMode(mode_number);
    check_floating(dtype);
    STD_TORCH_CHECK(input.dim() == 2, "input: expected a matrix, got ", input.dim(), " dimensions");
    STD_TORCH_CHECK(h.dim() == 2, "h: expected a matrix, got ", h.dim(), " dimensions");
    p.dtype = dtype_of(dtype);
    p.batch = input.size(0);
    p.input_size = input.size(1);
    p.hidden_size = p.state_size = h.size(1);
    const int64_t gates = gate_count(p.mode) * p.hidden_size;
    check_matrix("h", h, p.batch, p.hidden_size, dtype);
    check_matrix("w_ih", w_ih, gates, p.input_size, dtype);
    check_matrix("w_hh", w_hh, gates, p.hidden_size, dtype);
    STD_TORCH_CHECK(c.has_value() == lstm, "c: expected a tensor for an LSTM and None for the others");
    if (lstm) check_matrix("c", *c, p.batch, p.hidden_size, dtype);
    STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "b_ih, b_hh: expected both or neither");
    if (b_ih) {
      check_vector("b_ih", *b_ih, gates, dtype);
      check_vector("b_hh", *b_hh, gates, dtype);
    }
    h_1 = empty_matrix(p.batch, p.hidden_size, dtype);
    c_1 = lstm ? empty_matrix(p.batch, p.hidden_size, dtype) : nothing(dtype);
    if (h_1->numel() == 0) return;
    p.h_1 = h_1->mutable_data_ptr();
    p.input = rows_of(*(kept_[0] = dense_rows(input)));
    p.h = rows_of(*(kept_[1] = dense_rows(h)));
    p.w_ih = rows_of(*(kept_[2] = dense_rows(w_ih)));
    p.w_hh = rows_of(*(kept_[3] = dense_rows(w_hh)));
    if (lstm) {
      p.c = rows_of(*(kept_[4] = contiguous_rows(*c)));
      p.c_1 = c_1->mutable_data_ptr();
    }
    if (b_ih) {
      p.b_ih = (kept_[5] = dense_rows(*b_ih))->const_data_ptr();
      p.b_hh = (kept_[6] = dense_rows(*b_hh))->const_data_ptr();
    }
  }

  const bool lstm;
  const ScalarType dtype;
  Optional h_1, c_1;

 private:
  Optional kept_[7];
};

std::tuple<Tensor, Tensor, Tensor> recurrent_cell(int64_t mode, const Tensor& input, const Tensor& h, const Optional& c,
                                                  const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih,
                                                  const Optional& b_hh) {
  Operands operands(mode, input, h, c, w_ih, w_hh, b_ih, b_hh);
  CellParams& p = operands.p;
  Tensor kept = has_gates(p.mode) ? empty_matrix(p.batch, 4 * p.hidden_size, operands.dtype) : nothing(operands.dtype);
  p.gates = has_gates(p.mode) ? kept.mutable_data_ptr() : nullptr;
  if (operands.h_1->numel() > 0) run(p, kernels());
  return {*operands.h_1, *operands.c_1, kept};
}

std::tuple<Tensor, Tensor> recurrent_step(int64_t mode, const Tensor& input, const Tensor& h, const Optional& c,
                                          const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih,
                                          const Optional& b_hh, const Optional& norm_ih, const Optional& norm_hh,
                                          const Optional& norm_c, const Optional& norm_c_bias, double norm_eps,
                                          double zoneout_c, double zoneout_h) {
  Operands operands(mode, input, h, c, w_ih, w_hh, b_ih, b_hh);
  CellParams& p = operands.p;
  const NormOperands norm(p, p.mode, p.hidden_size, operands.dtype, norm_ih, norm_hh, norm_c, norm_c_bias);
  p.norm_eps = norm_eps;
  set_zoneout(p, p.mode, zoneout_c, zoneout_h);
  if (operands.h_1->numel() > 0) {
    const Optional sums = sums_for(p, p.batch);
    run(p, kernels());
  }
  return {*operands.h_1, *operands.c_1};
}

// A contiguous (batch, columns) operand of the backward pass.
Tensor operand(const char* name, const Tensor& tensor, int64_t batch, int64_t columns, ScalarType dtype) {
  check_matrix(name, tensor, batch, columns, dtype);
  return contiguous_rows(tensor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_cell_backward(int64_t mode_number, const Optional& grad_h,
                                                                   const Optional& grad_c, const Tensor& h,
                                                                   const Optional& c, const Tensor& h_1,
                                                                   const Tensor& c_1, const Tensor& gates) {
  CellBackwardParams p{};
  p.mode = mode_of(mode_number);
  const bool lstm = p.mode == CellMode::kLstm, gru = p.mode == CellMode::kGru;
  const ScalarType dtype = h.scalar_type();
  check_floating(dtype);
  STD_TORCH_CHECK(h.dim() == 2, "h: expected a matrix, got ", h.dim(), " dimensions");
  STD_TORCH_CHECK(c.has_value() == lstm, "c: expected a tensor for an LSTM and None for the others");
  p.dtype = dtype_of(dtype);
  p.batch = h.size(0);
  p.hidden_size = h.size(1);

  Optional kept[7];
  const auto take = [&](const void*& to, int i, const char* name, const Tensor& tensor, int64_t columns) {
    kept[i] = operand(name, tensor, p.batch, columns, dtype);
    to = kept[i]->const_data_ptr();
  };
  if (grad_h) take(p.grad_h, 0, "grad_h", *grad_h, p.hidden_size);
  if (lstm) {
    if (grad_c) take(p.grad_c, 1, "grad_c", *grad_c, p.hidden_size);
    take(p.c, 3, "c", *c, p.hidden_size);
    take(p.c_1, 5, "c_1", c_1, p.hidden_size);
  }
  if (gru) take(p.h, 2, "h", h, p.hidden_size);
  if (has_gates(p.mode)) {
    take(p.gates, 6, "gates", gates, 4 * p.hidden_size);
  } else {
    take(p.h_1, 4, "h_1", h_1, p.hidden_size);
  }

  Tensor to_gates_ih = empty_matrix(p.batch, gate_count(p.mode) * p.hidden_size, dtype);
  Tensor to_gates_hh = gru ? empty_matrix(p.batch, 3 * p.hidden_size, dtype) : nothing(dtype);
  Tensor to_h = gru ? empty_matrix(p.batch, p.hidden_size, dtype) : nothing(dtype);
  Tensor to_c = lstm ? empty_matrix(p.batch, p.hidden_size, dtype) : nothing(dtype);
  if (h.numel() == 0) return {to_gates_ih, to_gates_hh, to_h, to_c};
  p.to_gates_ih = to_gates_ih.mutable_data_ptr();
  p.to_gates_hh = to_gates_hh.mutable_data_ptr();
  p.to_h = to_h.mutable_data_ptr();
  p.to_c = to_c.mutable_data_ptr();
  const auto step = kernels().recurrent_cell_backward;
  const int64_t grain = std::max<int64_t>(1, kGrain / (4 * p.hidden_size));
  const auto rows = [&](int64_t begin, int64_t end) { step(p, begin, end); };
  if (p.batch <= grain) {
    rows(0, p.batch);
  } else {
    torch::stable::parallel_for(0, p.batch, grain, rows);
  }
  return {to_gates_ih, to_gates_hh, to_h, to_c};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("recurrent_cell", TORCH_BOX(&fastgen::recurrent_cell));
  m.impl("recurrent_step", TORCH_BOX(&fastgen::recurrent_step));
  m.impl("recurrent_cell_backward", TORCH_BOX(&fastgen::recurrent_cell_backward));
}
