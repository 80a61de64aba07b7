// fastgen::pick_tokens and rnn_generate on the CPU: fastgen/reference/generate.py says what they are.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/isa.h"
#include "cpu_rows.h"
#include "generate_ops.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

// Rows that are drawn at once: their weights are scratch of twice or four times their scores.
int64_t drawn_at_once(int64_t rows, int64_t vocabulary) {
  constexpr int64_t kWeights = 1 << 22;
  return std::min(rows,
                  std::max<int64_t>(torch::stable::get_num_threads(), kWeights / std::max<int64_t>(1, vocabulary)));
}

// p.weights has room for drawn_at_once.
void run(const DrawParams& p, int64_t rows, int64_t row_bytes) {
  const auto draw = kernels().draw_tokens;
  const int64_t group = drawn_at_once(rows, p.vocabulary);
  for (int64_t first = 0; first < rows; first += group) {
    DrawParams part = p;
    part.logits = static_cast<const char*>(p.logits) + first * row_bytes;
    part.seen_rows += first;
    part.seeds += first;
    part.elements += first;
    part.tokens += first;
    for_units(std::min(group, rows - first), 16 * p.vocabulary,
              [&](int64_t begin, int64_t end) { draw(part, begin, end); });
  }
}

Tensor pick_tokens(const Tensor& logits, const Optional& seen, const Tensor& seed_offset, double temperature,
                   int64_t top_k, double top_p, double min_p, double repetition_penalty) {
  const PickArguments arguments(logits, seen, seed_offset, temperature, top_k, top_p, min_p, repetition_penalty);
  const int64_t n = arguments.rows, vocabulary = arguments.options.vocabulary;
  const int64_t weight_sizes[] = {drawn_at_once(n, vocabulary), vocabulary};
  Tensor tokens = empty_cpu(&n, 1, ScalarType::Long);
  const Tensor weights = empty_cpu(weight_sizes, 2, ScalarType::Long);
  const int64_t* words = integers(seed_offset);
  std::vector<int64_t> rows;
  std::vector<uint64_t> seeds, elements;
  for (int64_t r = 0; r < n; ++r) {
    rows.push_back(r);
    seeds.push_back(uint64_t(words[2 * r]));
    elements.push_back(uint64_t(words[2 * r + 1]));
  }
  DrawParams p{};
  static_cast<DrawOptions&>(p) = arguments.options;
  p.logits = arguments.scores.const_data_ptr();
  p.seen = flags(seen);
  p.seen_rows = rows.data();
  p.seeds = seeds.data();
  p.elements = elements.data();
  p.weights = integers(weights);
  p.tokens = integers(tokens);
  run(p, n, vocabulary * int64_t(arguments.scores.element_size()));
  return tokens;
}

// x: dense rows, of which `index` picks `rows`.
const void* multiply(Output<Cpu>& output, const void* x, const int64_t* index, int64_t rows) {
  LinearRowsParams& p = output.p;
  p.x = {x, p.inputs, index};
  p.batch = rows;
  run(p, kernels());
  return p.y;
}

// That no row can be led out of its tokens or those that there are.
void check_values(const GenerateArguments<Cpu>& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.status[r] != kRunning) continue;
    const int64_t at = a.position[r], given = a.given[r], end = a.end[r];
    STD_TORCH_CHECK(at >= 0 && given >= 1 && given < end && at + 1 < end && end <= a.length,
                    "position, given, end: expected 0 <= position, 1 <= given < end <= ", a.length,
                    " and position + 1 < end in row ", r, ", got ", at, ", ", given, ", ", end);
    for (int64_t i = at; i < std::max(given, at + 1); ++i) {
      const int64_t id = a.tokens[r * a.length + i];
      STD_TORCH_CHECK(id >= 0 && id < a.vocabulary, "tokens: expected 0 to ", a.vocabulary - 1, " in row ", r, ", got ",
                      id);
    }
  }
}

void rnn_generate(int64_t mode, const Tensor& tokens, const Tensor& position, const Tensor& given, const Tensor& end,
                  const Tensor& status, const Tensor& h, const Optional& c, const Optional& seen,
                  const Tensor& embedding, const std::vector<Tensor>& weights, const Optional& projection,
                  const Tensor& output_weight, const Optional& output_bias, const Tensor& seed_offset,
                  double temperature, int64_t top_k, double top_p, double min_p, double repetition_penalty,
                  const Tensor& stop, int64_t steps, double norm_eps, double zoneout_c, double zoneout_h) {
  GenerateArguments<Cpu> a(mode, tokens, position, given, end, status, h, c, seen, embedding, weights, projection,
                           output_weight, output_bias, seed_offset, temperature, top_k, top_p, min_p,
                           repetition_penalty, stop, norm_eps, zoneout_c, zoneout_h);
  check_values(a);
  const int64_t n = a.rows, hidden = a.hidden;
  const Optional sums = sums_for(a.stack[0].p, n);  // of one layer at a time
  for (Layer& layer : a.stack) layer.p.sums = a.stack[0].p.sums;

  // Of the running rows: their numbers and the tokens they are fed; of those past their prompt: which they are.
  std::vector<int64_t> rows, fed, drawing, drawing_rows, drawn(static_cast<size_t>(n));
  std::vector<uint64_t> row_seeds, elements;
  const int64_t state_sizes[] = {2, n, hidden}, weight_sizes[] = {drawn_at_once(n, a.vocabulary), a.vocabulary};
  const Tensor fresh = empty_cpu(state_sizes, 3, h.scalar_type()), units = empty_cpu(weight_sizes, 2, ScalarType::Long);
  const int64_t row_bytes = hidden * int64_t(h.element_size());
  char* const h_1 = static_cast<char*>(fresh.mutable_data_ptr());

  DrawParams draw{};
  static_cast<DrawOptions&>(draw) = a.draw;
  draw.seen = a.seen;
  draw.weights = integers(units);
  draw.tokens = drawn.data();
  const KernelTable& table = kernels();

  for (int64_t step = 0; step < steps; ++step) {
    rows.clear(), fed.clear(), drawing.clear(), drawing_rows.clear(), row_seeds.clear(), elements.clear();
    for (int64_t r = 0; r < n; ++r) {
      if (a.status[r] != kRunning) continue;
      const int64_t at = ++a.position[r];
      fed.push_back(a.tokens[r * a.length + at - 1]);
      if (at >= a.given[r]) {
        drawing.push_back(int64_t(rows.size()));
        drawing_rows.push_back(r);
        row_seeds.push_back(uint64_t(a.seeds[2 * r]));
        elements.push_back(uint64_t(a.seeds[2 * r + 1]) + uint64_t(at));
      }
      rows.push_back(r);
    }
    if (rows.empty()) return;
    const int64_t running = int64_t(rows.size());

    RowsOperand x = {a.words.data, a.words.stride, fed.data()};
    for (int64_t l = 0; l < a.layers; ++l) {
      CellParams p = a.stack[size_t(l)].p;
      char* const state = a.h + l * n * row_bytes;
      p.batch = running;
      p.input = x;
      p.h = {state, hidden, rows.data()};
      if (a.lstm) {
        p.c_1 = a.c + l * n * row_bytes;
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
    if (a.project) {
      top = multiply(*a.project, top, index, last);
      index = nullptr;
    }
    draw.logits = multiply(*a.logits, top, index, last);
    draw.seen_rows = drawing_rows.data();
    draw.seeds = row_seeds.data();
    draw.elements = elements.data();
    run(draw, last, a.vocabulary * int64_t(h.element_size()));
    for (int64_t i = 0; i < last; ++i) {
      const int64_t r = drawing_rows[size_t(i)], at = a.position[r], y = drawn[size_t(i)];
      if (y < 0) {
        a.status[r] = kNotFinite;
        continue;
      }
      a.tokens[r * a.length + at] = y;
      if (a.seen != nullptr) a.seen[r * a.vocabulary + y] = true;
      if (std::find(a.stop, a.stop + a.stops, y) != a.stop + a.stops) {
        a.status[r] = kStopped;
      } else if (at + 1 == a.end[r]) {
        a.status[r] = kFull;
      }
    }
  }
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("pick_tokens", TORCH_BOX(&fastgen::pick_tokens));
  m.impl("rnn_generate", TORCH_BOX(&fastgen::rnn_generate));
}
