// fastgen::linear_rows, pick_tokens and rnn_generate on the CPU: fastgen/reference/generate.py says what they are.
#include <cstring>
#include <vector>

#include "../cpu/isa.h"
#include "cell_ops.h"
#include "cpu_rows.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

void run(const LinearRowsParams& p) {
  const auto product = kernels().linear_rows;
  for_units(blocks(p.outputs, kLinearOutputs), p.batch * p.inputs * kLinearOutputs,
            [&](int64_t begin, int64_t end) { product(p, begin, end); });
}

Tensor linear_rows(const Tensor& input, const Tensor& weight, const Optional& bias) {
  const LinearRowsArguments<Cpu> arguments(input, weight, bias);
  if (!arguments.empty()) run(arguments.p);
  return *arguments.output;
}

// The states of a row in a generation; those of fastgen/reference/generate.py.
enum Status : int64_t { kRunning, kStopped, kFull, kNotFinite };

void check_rows(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, ScalarType dtype) {
  const bool fits = tensor.dim() == (columns < 0 ? 1 : 2) && tensor.size(0) == rows &&
                    (columns < 0 || tensor.size(1) == columns) && tensor.scalar_type() == dtype && tensor.is_cpu() &&
                    tensor.is_contiguous();
  STD_TORCH_CHECK(fits, name, ": expected a contiguous tensor whose shape and dtype fit the other arguments");
}

int64_t* integers(const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

void check_vocabulary(const char* name, int64_t vocabulary) {
  STD_TORCH_CHECK(vocabulary > 0 && vocabulary <= int64_t(1) << 22, name, ": expected 1 to 2^22 tokens, got ",
                  vocabulary);
}

// How tokens are drawn. What belongs to the rows is the caller's.
DrawParams draw_params(ScalarType dtype, int64_t vocabulary, const Optional& seen, double temperature, int64_t top_k,
                       double top_p, double min_p, double repetition_penalty) {
  DrawParams p{};
  p.dtype = dtype_of(dtype);
  p.vocabulary = vocabulary;
  p.seen = seen ? static_cast<const bool*>(seen->const_data_ptr()) : nullptr;
  p.temperature = temperature;
  p.top_k = top_k;
  p.top_p = top_p;
  p.min_p = min_p;
  p.repetition_penalty = repetition_penalty;
  return p;
}
void run(const DrawParams& p, int64_t rows) {
  const auto draw = kernels().draw_tokens;
  for_units(rows, 16 * p.vocabulary, [&](int64_t begin, int64_t end) { draw(p, begin, end); });
}

Tensor pick_tokens(const Tensor& logits, const Optional& seen, const Tensor& seed_offset, double temperature,
                   int64_t top_k, double top_p, double min_p, double repetition_penalty) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_cpu(), "logits: expected (rows, vocabulary) on the CPU, got ",
                  logits.dim(), " dimensions");
  check_floating(logits.scalar_type());
  const int64_t n = logits.size(0), vocabulary = logits.size(1);
  check_vocabulary("logits", vocabulary);
  check_rows("seed_offset", seed_offset, n, 2, ScalarType::Long);
  if (seen) check_rows("seen", *seen, n, vocabulary, ScalarType::Bool);
  DrawParams p =
      draw_params(logits.scalar_type(), vocabulary, seen, temperature, top_k, top_p, min_p, repetition_penalty);
  const Tensor scores = contiguous_rows(logits);
  const int64_t sizes[] = {n, vocabulary};
  Tensor tokens = empty_cpu(sizes, 1, ScalarType::Long);
  const Tensor units = empty_cpu(sizes, 2, ScalarType::Long);
  const int64_t* words = integers(seed_offset);
  std::vector<int64_t> rows;
  std::vector<uint64_t> seeds, elements;
  for (int64_t r = 0; r < n; ++r) {
    rows.push_back(r);
    seeds.push_back(uint64_t(words[2 * r]));
    elements.push_back(uint64_t(words[2 * r + 1]));
  }
  p.logits = scores.const_data_ptr();
  p.seen_rows = rows.data();
  p.seeds = seeds.data();
  p.elements = elements.data();
  p.weights = integers(units);
  p.tokens = integers(tokens);
  run(p, n);
  return tokens;
}

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
  Optional b_ih_, b_hh_;
  std::optional<NormOperands> norm_;
};

// A linear map of the last layer's states.
class Output {
 public:
  Output(const char* name, const Tensor& weight, const Optional& bias, int64_t inputs, int64_t rows, const Kind& kind)
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
    const int64_t sizes[] = {rows, p.outputs};
    result_ = empty_cpu(sizes, 2, kind.dtype);
    p.y = result_->mutable_data_ptr();
  }

  // x: dense rows, of which `index` picks `rows`.
  const void* operator()(const void* x, const int64_t* index, int64_t rows) {
    p.x = {x, p.inputs, index};
    p.batch = rows;
    run(p);
    return p.y;
  }

  LinearRowsParams p{};

 private:
  Tensor weight_;
  Optional bias_, result_;
};

void rnn_generate(int64_t mode_number, const Tensor& tokens, const Tensor& position, const Tensor& given,
                  const Tensor& end, const Tensor& status, const Tensor& h, const Optional& c, const Optional& seen,
                  const Tensor& embedding, const std::vector<Tensor>& weights, const Optional& projection,
                  const Tensor& output_weight, const Optional& output_bias, const Tensor& seed_offset,
                  double temperature, int64_t top_k, double top_p, double min_p, double repetition_penalty,
                  const Tensor& stop, int64_t steps, double norm_eps, double zoneout_c, double zoneout_h) {
  const CellMode mode = mode_of(mode_number);
  const bool lstm = mode == CellMode::kLstm;
  const Kind kind(h);
  const ScalarType dtype = kind.dtype;
  STD_TORCH_CHECK(tokens.dim() == 2, "tokens: expected a matrix, got ", tokens.dim(), " dimensions");
  STD_TORCH_CHECK(h.dim() == 3 && h.size(0) > 0, "h: expected (layers, rows, hidden) with at least one layer");
  STD_TORCH_CHECK(embedding.dim() == 2, "embedding: expected a matrix, got ", embedding.dim(), " dimensions");
  const int64_t n = tokens.size(0), length = tokens.size(1), layers = h.size(0), hidden = h.size(2),
                vocabulary = embedding.size(0);
  check_rows("tokens", tokens, n, length, ScalarType::Long);
  check_rows("position", position, n, -1, ScalarType::Long);
  check_rows("given", given, n, -1, ScalarType::Long);
  check_rows("end", end, n, -1, ScalarType::Long);
  check_rows("status", status, n, -1, ScalarType::Long);
  check_rows("seed_offset", seed_offset, n, 2, ScalarType::Long);
  check_rows("stop", stop, stop.numel(), -1, ScalarType::Long);
  if (seen) check_rows("seen", *seen, n, vocabulary, ScalarType::Bool);
  STD_TORCH_CHECK(h.size(1) == n && h.is_contiguous() && h.is_cpu(), "h: expected a contiguous state of each row");
  STD_TORCH_CHECK(c.has_value() == lstm, "c: expected a tensor for an LSTM and None for the others");
  STD_TORCH_CHECK(!lstm || (same_sizes(*c, h) && c->scalar_type() == dtype && c->is_contiguous() && c->is_cpu()),
                  "c: expected the shape and dtype of h, contiguous");
  const int64_t count = int64_t(weights.size());
  const int64_t each = count / layers;
  STD_TORCH_CHECK(count == each * layers && (each == 2 || each == 4 || (lstm && (each == 6 || each == 8))),
                  "weights: expected 2 or 4, or 6 or 8 with layer norm, for each of ", layers, " layers, got ", count);
  check_vocabulary("embedding", vocabulary);
  check_matrix("embedding", embedding, vocabulary, embedding.size(1), kind);

  int64_t *const token = integers(tokens), *const at = integers(position), *const state_of = integers(status);
  const int64_t *const prompt = integers(given), *const until = integers(end), *const seeds = integers(seed_offset),
                       *const stops = integers(stop);
  for (int64_t r = 0; r < n; ++r) {
    if (state_of[r] != kRunning) continue;
    STD_TORCH_CHECK(at[r] >= 0 && prompt[r] >= 1 && prompt[r] <= until[r] && at[r] + 1 < until[r] && until[r] <= length,
                    "position, given, end: expected 0 <= position, 1 <= given <= end <= ", length,
                    " and position + 1 < end in row ", r, ", got ", at[r], ", ", prompt[r], ", ", until[r]);
    for (int64_t i = at[r]; i < std::max(prompt[r], at[r] + 1); ++i) {
      const int64_t id = token[r * length + i];
      STD_TORCH_CHECK(id >= 0 && id < vocabulary, "tokens: expected 0 to ", vocabulary - 1, " in row ", r, ", got ",
                      id);
    }
  }

  const Tensor words = dense_rows(embedding);
  std::vector<Layer> stack;
  stack.reserve(size_t(layers));
  for (int64_t l = 0; l < layers; ++l) {
    stack.emplace_back(&weights[size_t(l * each)], each, mode, l == 0 ? embedding.size(1) : hidden, hidden, kind);
    stack.back().p.norm_eps = norm_eps;
    set_zoneout(stack.back().p, mode, zoneout_c, zoneout_h);
  }
  const Optional sums = sums_for(stack[0].p, n);  // of one layer at a time
  for (Layer& layer : stack) layer.p.sums = stack[0].p.sums;
  std::optional<Output> project;
  if (projection) project.emplace("projection", *projection, std::nullopt, hidden, n, kind);
  Output logits("output_weight", output_weight, output_bias, project ? project->p.outputs : hidden, n, kind);
  STD_TORCH_CHECK(logits.p.outputs == vocabulary, "output_weight: expected ", vocabulary, " rows, got ",
                  logits.p.outputs);

  // Of the running rows: their numbers and the tokens they are fed; of those past their prompt: which they are.
  std::vector<int64_t> rows, fed, drawing, drawing_rows, drawn(static_cast<size_t>(n));
  std::vector<uint64_t> row_seeds, elements;
  const int64_t state_sizes[] = {2, n, hidden}, weight_sizes[] = {n, vocabulary};
  const Tensor fresh = empty_cpu(state_sizes, 3, dtype), units = empty_cpu(weight_sizes, 2, ScalarType::Long);
  const int64_t row_bytes = hidden * int64_t(h.element_size());
  char *const states = static_cast<char*>(h.mutable_data_ptr()), *const h_1 =
                                                                     static_cast<char*>(fresh.mutable_data_ptr());
  char* const cells = lstm ? static_cast<char*>(c->mutable_data_ptr()) : nullptr;

  DrawParams draw = draw_params(dtype, vocabulary, seen, temperature, top_k, top_p, min_p, repetition_penalty);
  draw.weights = integers(units);
  draw.tokens = drawn.data();
  const KernelTable& table = kernels();

  for (int64_t step = 0; step < steps; ++step) {
    rows.clear(), fed.clear(), drawing.clear(), drawing_rows.clear(), row_seeds.clear(), elements.clear();
    for (int64_t r = 0; r < n; ++r) {
      if (state_of[r] != kRunning) continue;
      fed.push_back(token[r * length + at[r]++]);
      if (at[r] >= prompt[r]) {
        drawing.push_back(int64_t(rows.size()));
        drawing_rows.push_back(r);
        row_seeds.push_back(uint64_t(seeds[2 * r]));
        elements.push_back(uint64_t(seeds[2 * r + 1]) + uint64_t(at[r]));
      }
      rows.push_back(r);
    }
    if (rows.empty()) return;
    const int64_t running = int64_t(rows.size());

    RowsOperand x = {words.const_data_ptr(), words.stride(0), fed.data()};
    for (int64_t l = 0; l < layers; ++l) {
      CellParams p = stack[size_t(l)].p;
      char* const state = states + l * n * row_bytes;
      p.batch = running;
      p.input = x;
      p.h = {state, hidden, rows.data()};
      if (lstm) {
        p.c_1 = cells + l * n * row_bytes;
        p.c = {p.c_1, hidden, rows.data()};
      }
      p.h_1 = h_1 + l % 2 * n * row_bytes;
      run(p, table);
      for (int64_t i = 0; i < running; ++i) {
        std::memcpy(state + rows[size_t(i)] * row_bytes, static_cast<char*>(p.h_1) + i * row_bytes, size_t(row_bytes));
      }
      x = {p.h_1, hidden, nullptr};
    }

    const int64_t last = int64_t(drawing.size());
    if (last == 0) continue;
    const int64_t* index = drawing.data();
    const void* top = x.data;
    if (project) {
      top = (*project)(top, index, last);
      index = nullptr;
    }
    draw.logits = logits(top, index, last);
    draw.seen_rows = drawing_rows.data();
    draw.seeds = row_seeds.data();
    draw.elements = elements.data();
    run(draw, last);
    for (int64_t i = 0; i < last; ++i) {
      const int64_t r = drawing_rows[size_t(i)], y = drawn[size_t(i)];
      if (y < 0) {
        state_of[r] = kNotFinite;
        continue;
      }
      token[r * length + at[r]] = y;
      if (seen) static_cast<bool*>(seen->mutable_data_ptr())[r * vocabulary + y] = true;
      if (std::find(stops, stops + stop.numel(), y) != stops + stop.numel()) {
        state_of[r] = kStopped;
      } else if (at[r] + 1 == until[r]) {
        state_of[r] = kFull;
      }
    }
  }
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&fastgen::linear_rows));
  m.impl("pick_tokens", TORCH_BOX(&fastgen::pick_tokens));
  m.impl("rnn_generate", TORCH_BOX(&fastgen::rnn_generate));
}
