// The recurrent sequence ops of any device: from their arguments to RecurrentParams.
#pragma once

#include <vector>

#include "tensor.h"

namespace fastgen {

// The steps of a call: padded (T, B, ...) or (B, T, ...), or packed (N, ...).
struct Steps {
  int64_t count, batch;
  std::vector<int64_t> sizes, rows;  // packed only: rows of each step, and the number of its first
  std::vector<int64_t> leading;      // dimensions of the results before the last

  Steps(const Tensor& input, const std::optional<Tensor>& batch_sizes, int64_t batch_of_h, bool batch_first)
      : batch(batch_of_h) {
    if (!batch_sizes) {
      STD_TORCH_CHECK(input.dim() == 3, "input: expected 3 dimensions, got ", input.dim());
      leading = {input.size(0), input.size(1)};
      count = leading[batch_first];
      STD_TORCH_CHECK(count > 0, "input: expected at least one step");
      STD_TORCH_CHECK(leading[!batch_first] == batch, "h_0: expected the batch size of input, ", leading[!batch_first],
                      ", got ", batch);
      return;
    }
    STD_TORCH_CHECK(input.dim() == 2, "input: expected 2 dimensions with batch_sizes, got ", input.dim());
    STD_TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->size(0) > 0 &&
                        batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->is_cpu(),
                    "batch_sizes: expected an int64 tensor (T,) on the CPU with at least one step");
    leading = {input.size(0)};
    count = batch_sizes->size(0);
    const auto* from = static_cast<const int64_t*>(batch_sizes->const_data_ptr());
    const int64_t stride = batch_sizes->stride(0);
    int64_t total = 0;
    for (int64_t t = 0; t < count; ++t) {
      sizes.push_back(from[t * stride]);
      rows.push_back(total);
      STD_TORCH_CHECK(sizes[t] > 0 && (t == 0 ? sizes[t] == batch : sizes[t] <= sizes[t - 1]),
                      "batch_sizes: expected positive numbers in descending order that begin with the batch size of "
                      "h_0, ",
                      batch);
      total += sizes[t];
    }
    STD_TORCH_CHECK(total == input.size(0), "batch_sizes: expected the sum ", input.size(0), ", got ", total);
  }
};

inline void check_shape(const char* name, const std::optional<Tensor>& tensor, const Tensor& like,
                        std::initializer_list<int64_t> sizes) {
  if (!tensor) return;
  bool fits = tensor->dim() == int64_t(sizes.size()) && tensor->scalar_type() == like.scalar_type() &&
              same_device(*tensor, like);
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = tensor->size(int64_t(d)) == sizes.begin()[d];
  STD_TORCH_CHECK(fits, name, ": expected the dtype of input and a shape that fits the other arguments, on its device");
}

// The arguments of both directions as RecurrentParams. Holds the contiguous copies that a stride asked for.
class RecurrentArguments {
 public:
  using Optional = std::optional<Tensor>;
  RecurrentParams p{};

  RecurrentArguments(int64_t mode, const Tensor& input, const Optional& batch_sizes, const Tensor& w_ih,
                     const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, const Optional& w_hr,
                     const Tensor& h_0, const Optional& c_0, const Optional& h_mask, bool batch_first, bool reverse)
      : steps_(input, batch_sizes, h_0.dim() == 2 ? h_0.size(0) : -1, batch_first),
        dtype_(input.scalar_type()),
        batch_first_(batch_first) {
    STD_TORCH_CHECK(mode >= 0 && mode < 4, "mode: expected 0 to 3, got ", mode);
    check_floating(dtype_);
    p.mode = CellMode(mode);
    p.dtype = dtype_of(dtype_);
    p.reverse = reverse;
    p.steps = steps_.count;
    p.batch = steps_.batch;
    p.input_size = input.size(input.dim() - 1);
    STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) % gate_count(p.mode) == 0,
                    "w_hh: expected a matrix with a row for each gate and unit");
    p.hidden_size = w_hh.size(0) / gate_count(p.mode);
    p.output_size = w_hr ? w_hr->size(0) : p.hidden_size;
    const int64_t rows = w_hh.size(0);
    const bool lstm = p.mode == CellMode::kLstm;
    STD_TORCH_CHECK(p.hidden_size > 0 && p.output_size > 0, "w_hh: expected at least one unit");
    STD_TORCH_CHECK(lstm == c_0.has_value(), "c_0: expected for an LSTM, and for no other cell");
    STD_TORCH_CHECK(lstm || !w_hr, "w_hr: expected for an LSTM only");
    check_shape("w_ih", w_ih, input, {rows, p.input_size});
    check_shape("w_hh", w_hh, input, {rows, p.output_size});
    check_shape("b_ih", b_ih, input, {rows});
    check_shape("b_hh", b_hh, input, {rows});
    check_shape("w_hr", w_hr, input, {p.output_size, p.hidden_size});
    check_shape("h_0", h_0, input, {p.batch, p.output_size});
    check_shape("c_0", c_0, input, {p.batch, p.hidden_size});
    check_shape("h_mask", h_mask, input, {p.batch, p.output_size});

    if (batch_sizes) {
      p.batch_sizes = steps_.sizes.data();
      p.step_rows = steps_.rows.data();
      p.row_batch = 1;
    } else {
      p.row_step = batch_first ? 1 : p.batch;
      p.row_batch = batch_first ? p.steps : 1;
    }
    p.rows = tokens();
    p.input = this->rows(input, p.input_step, p.input_batch);
    p.w_ih = contiguous(w_ih);
    p.w_hh = contiguous(w_hh);
    p.b_ih = contiguous(b_ih);
    p.b_hh = contiguous(b_hh);
    p.w_hr = contiguous(w_hr);
    p.h_0 = contiguous(h_0);
    p.c_0 = contiguous(c_0);
    p.h_mask = contiguous(h_mask);
  }

  // Rows with unit stride in the order of the input's, such as the gradient of the output: strides of a step and of a
  // row of the batch.
  const void* rows(const Tensor& tensor, int64_t& step, int64_t& batch) {
    const int64_t last = tensor.dim() - 1;
    const bool unit = tensor.size(last) == 1 || tensor.stride(last) == 1;
    const Tensor& in = unit ? tensor : keep(torch::stable::contiguous(tensor));
    batch = in.stride(p.step_rows != nullptr || batch_first_ ? 0 : 1);
    step = p.step_rows != nullptr ? 0 : in.stride(batch_first_ ? 1 : 0);
    return in.const_data_ptr();
  }

  // Of what the forward pass gave, and of its gradients.
  static void check_rows(const char* name, const Optional& tensor, const Tensor& input, int64_t width,
                         ScalarType type) {
    if (!tensor) return;
    bool fits = tensor->dim() == input.dim() && same_device(*tensor, input) && tensor->scalar_type() == type &&
                tensor->size(tensor->dim() - 1) == width;
    for (int64_t d = 0; fits && d + 1 < input.dim(); ++d) fits = tensor->size(d) == input.size(d);
    STD_TORCH_CHECK(fits, name, ": expected a row of ", width, " elements for each row of input");
  }

  // The shape of a result with a row for each row of the input.
  std::vector<int64_t> rows_of(int64_t width) const {
    std::vector<int64_t> sizes = steps_.leading;
    sizes.push_back(width);
    return sizes;
  }
  ScalarType dtype() const { return dtype_; }
  ScalarType work_dtype() const { return dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  // Rows of all steps: the measure of the work.
  int64_t tokens() const { return steps_.rows.empty() ? p.steps * p.batch : steps_.rows.back() + steps_.sizes.back(); }

  const void* contiguous(const Optional& tensor) {
    if (!tensor) return nullptr;
    return keep(as_contiguous(*tensor)).const_data_ptr();
  }

 private:
  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  Steps steps_;
  ScalarType dtype_;
  bool batch_first_;
  std::vector<Tensor> kept_;
};

}  // namespace fastgen
