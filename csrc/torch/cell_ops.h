// recurrent_cell, recurrent_step, their backward and linear_rows on any device: checks, allocation, parameters.
#pragma once

#include <tuple>

#include "rows.h"

namespace fastgen {

// Device: static Tensor empty(like, dtype, sizes, dims), an uninitialised contiguous tensor.
template <class Device>
Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns};
  return Device::empty(like, like.scalar_type(), sizes, 2);
}
template <class Device>
Tensor nothing(const Tensor& like) {
  const int64_t none = 0;
  return Device::empty(like, like.scalar_type(), &none, 1);
}
inline ScalarType work_dtype_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The operands of a step and its results. Holds the copies that strides asked for.
template <class Device>
class CellArguments {
 public:
  using Optional = std::optional<Tensor>;
  CellParams p{};

  CellArguments(int64_t mode, const Tensor& input, const Tensor& h, const Optional& c, const Tensor& w_ih,
                const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, bool save)
      : kind_(input), lstm_(mode_of(mode) == CellMode::kLstm) {
    p.mode = CellMode(mode);
    STD_TORCH_CHECK(input.dim() == 2, "input: expected a matrix, got ", input.dim(), " dimensions");
    STD_TORCH_CHECK(h.dim() == 2, "h: expected a matrix, got ", h.dim(), " dimensions");
    p.dtype = dtype_of(kind_.dtype);
    p.batch = input.size(0);
    p.input_size = input.size(1);
    p.hidden_size = p.state_size = h.size(1);
    const int64_t rows = gate_count(p.mode) * p.hidden_size;
    check_matrix("h", h, p.batch, p.hidden_size, kind_);
    check_matrix("w_ih", w_ih, rows, p.input_size, kind_);
    check_matrix("w_hh", w_hh, rows, p.hidden_size, kind_);
    STD_TORCH_CHECK(c.has_value() == lstm_, "c: expected a tensor for an LSTM and None for the others");
    if (lstm_) check_matrix("c", *c, p.batch, p.hidden_size, kind_);
    STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "b_ih, b_hh: expected both or neither");
    if (b_ih) {
      check_vector("b_ih", *b_ih, rows, kind_);
      check_vector("b_hh", *b_hh, rows, kind_);
    }
    h_1 = empty_matrix<Device>(input, p.batch, p.hidden_size);
    c_1 = lstm_ ? empty_matrix<Device>(input, p.batch, p.hidden_size) : nothing<Device>(input);
    const int64_t sizes[] = {p.batch, p.hidden_size};
    gates =
        save ? empty_matrix<Device>(input, p.batch, saved_cell_gates(p.mode) * p.hidden_size) : nothing<Device>(input);
    cells = save && lstm_ ? Device::empty(input, work_dtype_of(kind_.dtype), sizes, 2) : nothing<Device>(input);
    if (empty()) return;
    p.h_1 = h_1->mutable_data_ptr();
    p.gates = save ? gates->mutable_data_ptr() : nullptr;
    p.cells = save && lstm_ ? cells->mutable_data_ptr() : nullptr;
    p.input = rows_of(*(kept_[0] = dense_rows(input)));
    p.h = rows_of(*(kept_[1] = dense_rows(h)));
    p.w_ih = rows_of(*(kept_[2] = dense_rows(w_ih)));
    p.w_hh = rows_of(*(kept_[3] = dense_rows(w_hh)));
    if (lstm_) {
      p.c = rows_of(*(kept_[4] = as_contiguous(*c)));
      p.c_1 = c_1->mutable_data_ptr();
    }
    if (b_ih) {
      p.b_ih = (kept_[5] = dense_rows(*b_ih))->const_data_ptr();
      p.b_hh = (kept_[6] = dense_rows(*b_hh))->const_data_ptr();
    }
  }

  // Layer norm and the expectation of zoneout.
  void set(const Optional& norm_ih, const Optional& norm_hh, const Optional& norm_c, const Optional& norm_c_bias,
           double norm_eps, double zoneout_c, double zoneout_h) {
    norm_.emplace(p, p.mode, p.hidden_size, kind_, norm_ih, norm_hh, norm_c, norm_c_bias);
    p.norm_eps = norm_eps;
    set_zoneout(p, p.mode, zoneout_c, zoneout_h);
  }

  bool empty() const { return h_1->numel() == 0; }

  Optional h_1, c_1, gates, cells;

 private:
  const Kind kind_;
  const bool lstm_;
  Optional kept_[7];
  std::optional<NormOperands> norm_;
};

// The same of the backward pass. Results that are not wanted are empty.
template <class Device>
class CellBackwardArguments {
 public:
  using Optional = std::optional<Tensor>;
  // Those of input, h, c, w_ih, w_hh, b_ih, b_hh.
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  CellBackwardParams p{};
  int64_t input_size;
  RowsOperand input, w_ih, w_hh;

  CellBackwardArguments(int64_t mode, const Optional& grad_h_1, const Optional& grad_c_1, const Tensor& input,
                        const Tensor& h, const Optional& c, const Tensor& w_ih, const Tensor& w_hh,
                        const Optional& b_ih, const Optional& b_hh, const Tensor& gates, const Tensor& cells,
                        int64_t needs)
      : kind_(input) {
    p.mode = mode_of(mode);
    const bool lstm = p.mode == CellMode::kLstm;
    STD_TORCH_CHECK(input.dim() == 2, "input: expected a matrix, got ", input.dim(), " dimensions");
    STD_TORCH_CHECK(h.dim() == 2, "h: expected a matrix, got ", h.dim(), " dimensions");
    STD_TORCH_CHECK(c.has_value() == lstm, "c: expected a tensor for an LSTM and None for the others");
    p.dtype = dtype_of(kind_.dtype);
    p.batch = input.size(0);
    input_size = input.size(1);
    p.hidden_size = h.size(1);
    const int64_t units = p.hidden_size, rows = gate_count(p.mode) * units;
    check_matrix("h", h, p.batch, units, kind_);
    check_matrix("w_ih", w_ih, rows, input_size, kind_);
    check_matrix("w_hh", w_hh, rows, units, kind_);
    if (b_ih) check_vector("b_ih", *b_ih, rows, kind_);
    if (b_hh) check_vector("b_hh", *b_hh, rows, kind_);
    if (grad_h_1) p.grad_h_1 = take(0, "grad_h_1", *grad_h_1, units);
    if (lstm && grad_c_1) p.grad_c_1 = take(1, "grad_c_1", *grad_c_1, units);
    if (lstm) {
      p.c = take(2, "c", *c, units);
      STD_TORCH_CHECK(cells.dim() == 2 && cells.size(0) == p.batch && cells.size(1) == units &&
                          cells.scalar_type() == work_dtype_of(kind_.dtype) && same_device(cells, input),
                      "cells: expected a matrix of ", p.batch, " x ", units, " in the dtype of the sums");
      p.cells = (kept_[3] = as_contiguous(cells))->const_data_ptr();
    }
    p.gates = take(4, "gates", gates, saved_cell_gates(p.mode) * units);
    this->input = rows_of(*(kept_[5] = dense_rows(input)));
    p.h = rows_of(*(kept_[6] = dense_rows(h)));
    this->w_ih = rows_of(*(kept_[7] = dense_rows(w_ih)));
    this->w_hh = rows_of(*(kept_[8] = dense_rows(w_hh)));
    const auto result = [&](int i, bool exists, int64_t rows, int64_t columns, int64_t dims = 2) {
      const bool wanted = exists && (needs >> i & 1);
      const int64_t sizes[] = {rows, columns};
      Tensor out = wanted ? Device::empty(input, kind_.dtype, sizes, dims) : nothing<Device>(input);
      grads[i] = wanted ? out.mutable_data_ptr() : nullptr;
      return out;
    };
    results.emplace(Results{result(0, true, p.batch, input_size), result(1, true, p.batch, units),
                            result(2, lstm, p.batch, units), result(3, true, rows, input_size),
                            result(4, true, rows, units), result(5, b_ih.has_value(), rows, 1, 1),
                            result(6, b_hh.has_value(), rows, 1, 1)});
    p.grad_c = grads[2];
    if (empty()) {
      std::apply([](auto&... each) { (torch::stable::zero_(each), ...); }, *results);
    }
  }

  bool empty() const { return p.batch == 0 || p.hidden_size == 0; }

  std::optional<Results> results;
  void* grads[7];  // where they are; null: not wanted

 private:
  // A contiguous (batch, columns) operand.
  const void* take(int i, const char* name, const Tensor& tensor, int64_t columns) {
    check_matrix(name, tensor, p.batch, columns, kind_);
    return (kept_[i] = as_contiguous(tensor))->const_data_ptr();
  }

  const Kind kind_;
  Optional kept_[9];
};

template <class Params>
void set_sizes(Params& p, const Tensor& input, const Tensor& weight, const Kind& kind) {
  STD_TORCH_CHECK(input.dim() == 2, "input: expected a matrix, got ", input.dim(), " dimensions");
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected a matrix, got ", weight.dim(), " dimensions");
  p.dtype = dtype_of(kind.dtype);
  p.batch = input.size(0);
  p.inputs = input.size(1);
  p.outputs = weight.size(0);
  check_matrix("weight", weight, p.outputs, p.inputs, kind);
}

// The operands of linear_rows and its result.
template <class Device>
class LinearRowsArguments {
 public:
  using Optional = std::optional<Tensor>;
  LinearRowsParams p{};

  LinearRowsArguments(const Tensor& input, const Tensor& weight, const Optional& bias) {
    const Kind kind(input);
    set_sizes(p, input, weight, kind);
    if (bias) check_vector("bias", *bias, p.outputs, kind);
    output = empty_matrix<Device>(input, p.batch, p.outputs);
    if (empty()) return;
    p.x = rows_of(*(kept_[0] = dense_rows(input)));
    p.w = rows_of(*(kept_[1] = dense_rows(weight)));
    if (bias) p.bias = (kept_[2] = dense_rows(*bias))->const_data_ptr();
    p.y = output->mutable_data_ptr();
  }

  bool empty() const { return output->numel() == 0; }

  Optional output;

 private:
  Optional kept_[3];
};

// The operands of linear_rows_backward and its results, (grad_input, grad_weight, grad_bias); empty where not wanted.
template <class Device>
class LinearRowsBackwardArguments {
 public:
  using Optional = std::optional<Tensor>;
  using Results = std::tuple<Tensor, Tensor, Tensor>;
  LinearRowsBackwardParams p{};

  LinearRowsBackwardArguments(const Tensor& grad, const Tensor& input, const Tensor& weight, int64_t needs) {
    const Kind kind(input);
    set_sizes(p, input, weight, kind);
    check_matrix("grad", grad, p.batch, p.outputs, kind);
    const auto result = [&](int i, void*& to, int64_t rows, int64_t columns, int64_t dims) {
      const bool wanted = needs >> i & 1;
      const int64_t sizes[] = {rows, columns};
      Tensor out = wanted ? Device::empty(input, kind.dtype, sizes, dims) : nothing<Device>(input);
      to = wanted ? out.mutable_data_ptr() : nullptr;
      return out;
    };
    results.emplace(Results{result(0, p.grad_x, p.batch, p.inputs, 2), result(1, p.grad_w, p.outputs, p.inputs, 2),
                            result(2, p.grad_bias, p.outputs, 1, 1)});
    const ScalarType work = work_dtype_of(kind.dtype);
    kept_[0] = as_contiguous(work == kind.dtype ? grad : torch::stable::to(grad, work));
    p.grad_y = kept_[0]->const_data_ptr();
    p.x = rows_of(*(kept_[1] = dense_rows(input)));
    p.w = rows_of(*(kept_[2] = dense_rows(weight)));
  }

  std::optional<Results> results;

 private:
  Optional kept_[3];
};

}  // namespace fastgen
