// pick_tokens and rnn_generate on any device: checks, allocation, parameters. fastgen/reference/generate.py says what
// the arguments are.
#pragma once

#include <vector>

#include "cell_ops.h"

namespace fastgen {

// The states of a row in a generation; those of fastgen/reference/generate.py.
enum Status : int64_t { kRunning, kStopped, kFull, kNotFinite, kInvalid };

// columns: -1 for a vector.
inline void check_rows(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, ScalarType dtype,
                       const Tensor& like) {
  const bool fits = tensor.dim() == (columns < 0 ? 1 : 2) && tensor.size(0) == rows &&
                    (columns < 0 || tensor.size(1) == columns) && tensor.scalar_type() == dtype &&
                    same_device(tensor, like) && tensor.is_contiguous();
  STD_TORCH_CHECK(fits, name, ": expected a contiguous tensor whose shape, dtype and device fit the other arguments");
}

inline void check_vocabulary(const char* name, int64_t vocabulary) {
  STD_TORCH_CHECK(vocabulary > 0 && vocabulary <= int64_t(1) << 22, name, ": expected 1 to 2^22 tokens, got ",
                  vocabulary);
}

inline int64_t* integers(const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

inline bool* flags(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<bool*>(tensor->mutable_data_ptr()) : nullptr;
}

inline DrawOptions draw_options(ScalarType dtype, int64_t vocabulary, double temperature, int64_t top_k, double top_p,
                                double min_p, double repetition_penalty) {
  return {dtype_of(dtype), vocabulary, temperature, top_p, min_p, repetition_penalty, top_k};
}

// The operands of pick_tokens; `scores` holds a copy where strides asked for one.
struct PickArguments {
  PickArguments(const Tensor& logits, const std::optional<Tensor>& seen, const Tensor& seed_offset, double temperature,
                int64_t top_k, double top_p, double min_p, double repetition_penalty) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits: expected (rows, vocabulary), got ", logits.dim(), " dimensions");
    check_floating(logits.scalar_type());
    rows = logits.size(0);
    const int64_t vocabulary = logits.size(1);
    check_vocabulary("logits", vocabulary);
    check_rows("seed_offset", seed_offset, rows, 2, ScalarType::Long, logits);
    if (seen) check_rows("seen", *seen, rows, vocabulary, ScalarType::Bool, logits);
    options = draw_options(logits.scalar_type(), vocabulary, temperature, top_k, top_p, min_p, repetition_penalty);
    scores = as_contiguous(logits);
  }

  DrawOptions options;
  int64_t rows;
  Tensor scores;
};

// One layer's weights, w_ih, w_hh, the two biases if `count` has them and then the four of layer norm, and the copies
// that their strides asked for.
class Layer {
 public:
  Layer(const Tensor* weights, int64_t count, CellMode mode, int64_t inputs, int64_t hidden, const Kind& kind)
      : w_ih_(dense_rows(weights[0])), w_hh_(dense_rows(weights[1])) {
    const int64_t rows = gate_count(mode) * hidden;
    check_matrix("weights", w_ih_, rows, inputs, kind);
    check_matrix("weights", w_hh_, rows, hidden, kind);
    p.mode = mode;
    p.dtype = dtype_of(kind.dtype);
    p.input_size = inputs;
    p.state_size = p.hidden_size = hidden;
    p.w_ih = rows_of(w_ih_);
    p.w_hh = rows_of(w_hh_);
    if (count > 4) {
      const Tensor* norm = weights + count - 4;
      norm_.emplace(p, mode, hidden, kind, norm[0], norm[1], norm[2], norm[3]);
    }
    if (count % 4 != 0) return;
    check_vector("weights", weights[2], rows, kind);
    check_vector("weights", weights[3], rows, kind);
    b_ih_ = dense_rows(weights[2]);
    b_hh_ = dense_rows(weights[3]);
    p.b_ih = b_ih_->const_data_ptr();
    p.b_hh = b_hh_->const_data_ptr();
  }

  CellParams p{};  // without the operands that a step brings

 private:
  Tensor w_ih_, w_hh_;
  std::optional<Tensor> b_ih_, b_hh_;
  std::optional<NormOperands> norm_;
};

// A linear map of up to `rows` of the last layer's states, and the memory for its result.
template <class Device>
class Output {
 public:
  Output(const char* name, const Tensor& weight, const std::optional<Tensor>& bias, int64_t inputs, int64_t rows,
         const Kind& kind)
      : weight_(dense_rows(weight)) {
    STD_TORCH_CHECK(weight.dim() == 2, name, ": expected a matrix, got ", weight.dim(), " dimensions");
    check_matrix(name, weight_, weight.size(0), inputs, kind);
    p.dtype = dtype_of(kind.dtype);
    p.inputs = inputs;
    p.outputs = weight.size(0);
    p.w = rows_of(weight_);
    if (bias) {
      check_vector("output_bias", *bias, p.outputs, kind);
      bias_ = dense_rows(*bias);
      p.bias = bias_->const_data_ptr();
    }
    result_ = empty_matrix<Device>(weight, rows, p.outputs);
    p.y = result_->mutable_data_ptr();
  }

  LinearRowsParams p{};  // without x and the number of its rows

 private:
  Tensor weight_;
  std::optional<Tensor> bias_, result_;
};

// What rnn_generate was given, as far as it can be checked without looking at numbers.
template <class Device>
class GenerateArguments {
 public:
  using Optional = std::optional<Tensor>;

  GenerateArguments(int64_t mode_number, const Tensor& tokens, const Tensor& position, const Tensor& given,
                    const Tensor& end, const Tensor& status, const Tensor& h, const Optional& c, const Optional& seen,
                    const Tensor& embedding, const std::vector<Tensor>& weights, const Optional& projection,
                    const Tensor& output_weight, const Optional& output_bias, const Tensor& seed_offset,
                    double temperature, int64_t top_k, double top_p, double min_p, double repetition_penalty,
                    const Tensor& stop, double norm_eps, double zoneout_c, double zoneout_h)
      : mode(mode_of(mode_number)), lstm(mode == CellMode::kLstm), kind_(h) {
    STD_TORCH_CHECK(tokens.dim() == 2, "tokens: expected a matrix, got ", tokens.dim(), " dimensions");
    STD_TORCH_CHECK(h.dim() == 3 && h.size(0) > 0, "h: expected (layers, rows, hidden) with at least one layer");
    STD_TORCH_CHECK(embedding.dim() == 2, "embedding: expected a matrix, got ", embedding.dim(), " dimensions");
    rows = tokens.size(0);
    length = tokens.size(1);
    layers = h.size(0);
    hidden = h.size(2);
    vocabulary = embedding.size(0);
    const auto check = [&](const char* name, const Tensor& tensor, int64_t columns = -1) {
      check_rows(name, tensor, rows, columns, ScalarType::Long, h);
      return integers(tensor);
    };
    this->tokens = check("tokens", tokens, length);
    this->position = check("position", position);
    this->given = check("given", given);
    this->end = check("end", end);
    this->status = check("status", status);
    seeds = check("seed_offset", seed_offset, 2);
    check_rows("stop", stop, stop.numel(), -1, ScalarType::Long, h);
    this->stop = integers(stop);
    stops = stop.numel();
    if (seen) check_rows("seen", *seen, rows, vocabulary, ScalarType::Bool, h);
    this->seen = flags(seen);
    STD_TORCH_CHECK(h.size(1) == rows && h.is_contiguous(), "h: expected a contiguous state of each row");
    STD_TORCH_CHECK(c.has_value() == lstm, "c: expected a tensor for an LSTM and None for the others");
    STD_TORCH_CHECK(!lstm || (same_sizes(*c, h) && c->is_contiguous()), "c: expected the shape of h, contiguous");
    this->h = static_cast<char*>(h.mutable_data_ptr());
    if (lstm) {
      kind_.check("c", *c);
      this->c = static_cast<char*>(c->mutable_data_ptr());
    }
    const int64_t count = int64_t(weights.size()), each = count / layers;
    STD_TORCH_CHECK(count == each * layers && (each == 2 || each == 4 || (lstm && (each == 6 || each == 8))),
                    "weights: expected 2 or 4, or 6 or 8 with layer norm, for each of ", layers, " layers, got ",
                    count);
    check_vocabulary("embedding", vocabulary);
    check_matrix("embedding", embedding, vocabulary, embedding.size(1), kind_);
    words_ = dense_rows(embedding);
    words = rows_of(*words_);
    stack.reserve(size_t(layers));
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t inputs = l == 0 ? embedding.size(1) : hidden;
      stack.emplace_back(&weights[size_t(l * each)], each, mode, inputs, hidden, kind_);
      stack.back().p.norm_eps = norm_eps;
      set_zoneout(stack.back().p, mode, zoneout_c, zoneout_h);
    }
    if (projection) project.emplace("projection", *projection, std::nullopt, hidden, rows, kind_);
    const int64_t inputs = project ? project->p.outputs : hidden;
    logits.emplace("output_weight", output_weight, output_bias, inputs, rows, kind_);
    STD_TORCH_CHECK(logits->p.outputs == vocabulary, "output_weight: expected ", vocabulary, " rows, got ",
                    logits->p.outputs);
    draw = draw_options(kind_.dtype, vocabulary, temperature, top_k, top_p, min_p, repetition_penalty);
  }

  const CellMode mode;
  const bool lstm;
  int64_t rows, length, layers, hidden, vocabulary, stops;
  int64_t *tokens, *position, *status;
  const int64_t *given, *end, *seeds, *stop;
  bool* seen;
  char *h, *c = nullptr;
  RowsOperand words;
  std::vector<Layer> stack;
  std::optional<Output<Device>> project, logits;
  DrawOptions draw;

 private:
  const Kind kind_;
  Optional words_;
};

}  // namespace fastgen
