// fastgen::pick_tokens and rnn_generate on CUDA: fastgen/reference/generate.py says what they are.
//
// The host enqueues the kernels of one token after the other and does not wait for what they draw. What a row does next
// it says by its stage, in device memory: a kernel passes over the rows that do nothing, so that one whose text has
// ended stays as it was. Now and then the host asks which rows still run and goes on without the answer; when it is
// there, the kernels have a list of those that ran at the time, and where none did, the rest is not launched.
#include <algorithm>
#include <bit>
#include <cstddef>

#include "../torch/generate_ops.h"
#include "cell.h"
#include "check.h"
#include "draw.inl"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

// Of a row and the next token that it is fed. Rows behind their prompt have their next token drawn.
enum Stage : int32_t { kIdle, kReading, kDrawing };

constexpr int64_t kAskEvery = 16;  // tokens

// The states of a row, (layers, rows, H) or of one layer after the other, as words.
struct States {
  const uint16_t* from;
  uint16_t* to;
};

struct GenerateParams : Draw {
  RowChoice rows;
  int64_t row_count, length, stops;
  int64_t *tokens, *position, *status;
  const int64_t *given, *end, *stop;
  bool* seen_to;
  int64_t* fed;  // (rows), the token
  int32_t* stage;
  States h, c;
  int64_t layers, row_words;
};

// What a row does next that has been fed all tokens before `at`.
__device__ inline void settle(const GenerateParams& p, int64_t row, int64_t at, int64_t status) {
  int64_t token = 0;
  if (status == kRunning) {
    token = p.tokens[row * p.length + at];
    if (token < 0 || token >= p.vocabulary) status = kInvalid;
  }
  p.status[row] = status;
  p.fed[row] = status == kRunning ? token : 0;
  p.stage[row] = status != kRunning ? kIdle : at + 1 < p.given[row] ? kReading : kDrawing;
}

__global__ void __launch_bounds__(kSliceThreads) begin_kernel(GenerateParams p) {
  const int64_t row = int64_t(blockIdx.x) * kSliceThreads + threadIdx.x;
  if (row >= p.row_count) return;
  const int64_t at = p.position[row], given = p.given[row], end = p.end[row], status = p.status[row];
  const bool fits = at >= 0 && given >= 1 && given < end && at + 1 < end && end <= p.length;
  settle(p, row, at, status == kRunning && !fits ? int64_t(kInvalid) : status);
}

// A warp: the rows that run, in their order, and how many they are.
__global__ void __launch_bounds__(32)
    list_kernel(const int32_t* stage, int64_t rows, int32_t* numbers, int32_t* count) {
  const int lane = int(threadIdx.x);
  int32_t before = 0;
  for (int64_t first = 0; first < rows; first += 32) {
    const bool runs = first + lane < rows && stage[first + lane] != kIdle;
    int32_t upto = runs ? 1 : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int32_t more = shuffle(upto, (lane - step) & 31);
      if (lane >= step) upto += more;
    }
    if (runs) numbers[before + upto - 1] = int32_t(first + lane);
    before += shuffle(upto, 31);
  }
  if (lane == 0) *count = before;
}

// Rows that are longer than a slice, block (i, k) for slice k of the row at place i: their best scores, then their
// weights.
__global__ void __launch_bounds__(kSliceThreads) best_kernel(Draw p, RowChoice rows) {
  const int64_t row = rows.row(blockIdx.x), begin = int64_t(blockIdx.y) * kSlice;
  if (!rows.wanted(row)) return;
  const Best best = best_of_scores(p, row, begin, begin + kSlice < p.vocabulary ? begin + kSlice : p.vocabulary);
  if (threadIdx.x == 0) p.best[row * p.slices + blockIdx.y] = best;
}

__global__ void __launch_bounds__(kSliceThreads) weights_kernel(Draw p, RowChoice rows) {
  const int64_t row = rows.row(blockIdx.x), begin = int64_t(blockIdx.y) * kSlice;
  if (!rows.wanted(row)) return;
  const double most = best_of_slices(p, row).score;
  if (!is_finite(most)) return;
  store_weights(p, row, begin, begin + kSlice < p.vocabulary ? begin + kSlice : p.vocabulary, most,
                p.weights + row * p.vocabulary);
}

__global__ void __launch_bounds__(kMostThreads) pick_kernel(Draw p, int64_t* tokens) {
  const int64_t token = pick(p, blockIdx.x, uint64_t(p.seed_offset[2 * int64_t(blockIdx.x) + 1]));
  if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

__device__ inline void take(const GenerateParams& p, const States& states, int64_t row) {
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const int64_t first = (layer * p.row_count + row) * p.row_words;
    for (int64_t i = threadIdx.x; i < p.row_words; i += blockDim.x) states.to[first + i] = states.from[first + i];
  }
}

// The end of a token: a row takes its new states, and the next token where its prompt is over.
__global__ void __launch_bounds__(kMostThreads) advance_kernel(GenerateParams p) {
  const int64_t row = p.rows.row(blockIdx.x), at = p.position[row] + 1;
  const int32_t stage = p.stage[row];
  if (stage == kIdle) return;
  take(p, p.h, row);
  if (p.c.to != nullptr) take(p, p.c, row);
  int64_t token = -1;
  bool stops = false;
  if (stage == kDrawing) {
    token = pick(p, row, uint64_t(p.seed_offset[2 * row + 1]) + uint64_t(at));
    for (int64_t i = lane_of_thread(); i < p.stops; i += 32) stops |= p.stop[i] == token;
    stops = warp_any(stops);
  }
  block_barrier();  // all threads have read where the row stood
  if (threadIdx.x != 0) return;
  p.position[row] = at;
  if (stage == kReading) return settle(p, row, at, kRunning);
  if (token < 0) return settle(p, row, at, kNotFinite);
  p.tokens[row * p.length + at] = token;
  if (p.seen_to != nullptr) p.seen_to[row * p.vocabulary + token] = true;
  settle(p, row, at, stops ? kStopped : at + 1 == p.end[row] ? kFull : kRunning);
}

// ---------------------------------------------------------------------------------------------------
// Launches

bool takes(const Tensor& h) { return h.scalar_type() != ScalarType::Double; }

template <class T>
T* pointer(const Optional& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// The memory for the draws of up to `rows` rows, and launches of what comes before the block of a row.
class Drawing {
 public:
  Drawing(const DrawOptions& options, int64_t rows, const Tensor& like) {
    static_cast<DrawOptions&>(p) = options;
    p.slices = int(ceil_div(p.vocabulary, kSlice));
    if (p.slices == 1) return;
    static_assert(sizeof(Best) == 2 * sizeof(double));
    const int64_t best[] = {rows, p.slices, 2}, weights[] = {rows, p.temperature == 0 ? 0 : p.vocabulary};
    best_ = torch::stable::new_empty(like, {best, 3}, ScalarType::Double);
    weights_ = torch::stable::new_empty(like, {weights, 2}, ScalarType::Long);
    p.best = pointer<Best>(best_);
    p.weights = pointer<int64_t>(weights_);
  }

  void launch_slices(const RowChoice& rows, int64_t count, cudaStream_t stream) const {
    if (p.slices == 1) return;
    const dim3 grid{unsigned(count), unsigned(p.slices)};
    launch(best_kernel, grid, kSliceThreads, kWithoutWeights, stream, p, rows);
    if (p.temperature != 0) launch(weights_kernel, grid, kSliceThreads, kWithoutWeights, stream, p, rows);
  }

  unsigned threads() const {
    return unsigned(std::clamp<uint64_t>(std::bit_ceil(uint64_t(p.vocabulary)), 128, kMostThreads));
  }

  size_t shared_bytes() const {
    return kWithoutWeights + sizeof(int64_t) * size_t(std::min<int64_t>(p.vocabulary, kSlice));
  }

  Draw p{};

 private:
  static constexpr size_t kWithoutWeights = offsetof(DrawShared, weights);

  Optional best_, weights_;
};

Tensor pick_tokens(const Tensor& logits, const Optional& seen, const Tensor& seed_offset, double temperature,
                   int64_t top_k, double top_p, double min_p, double repetition_penalty) {
  const PickArguments arguments(logits, seen, seed_offset, temperature, top_k, top_p, min_p, repetition_penalty);
  const OnDevice device(logits);
  const cudaStream_t stream = current_stream(logits);
  Tensor tokens = torch::stable::new_empty(logits, {arguments.rows}, ScalarType::Long);
  if (arguments.rows == 0) return tokens;
  Drawing draw(arguments.options, arguments.rows, logits);
  draw.p.logits = arguments.scores.const_data_ptr();
  draw.p.seen = flags(seen);
  draw.p.seed_offset = integers(seed_offset);
  draw.launch_slices({}, arguments.rows, stream);
  launch(pick_kernel, unsigned(arguments.rows), draw.threads(), draw.shared_bytes(), stream, draw.p, integers(tokens));
  return tokens;
}

// The rows that may still run, as far as the host knows.
class RunningRows {
 public:
  RunningRows(int64_t rows, const int32_t* stage, const Tensor& like, cudaStream_t stream)
      : rows_(rows), stage_(stage), stream_(stream), asks_(!is_captured(stream)), count_(rows) {
    const int64_t sizes[] = {2, rows};
    lists_ = torch::stable::new_empty(like, {sizes, 2}, ScalarType::Int);
    found_ = torch::stable::new_empty(like, {1}, ScalarType::Int);
  }

  // Between two tokens.
  void look() {
    if (asked_) {
      if (const auto count = answer_.look()) {
        count_ = *count;
        list_ = next_;
        next_ = 1 - next_;
        asked_ = false;
      }
    } else if (asks_ && since_ % kAskEvery == 0) {
      launch(list_kernel, 1, 32, 0, stream_, stage_, rows_, list(next_), pointer<int32_t>(found_));
      answer_.ask(*found_);
      asked_ = true;
    }
    ++since_;
  }

  int64_t count() const { return count_; }
  RowChoice at_least(Stage stage) const { return {list_ < 0 ? nullptr : list(list_), stage_, stage}; }

 private:
  int32_t* list(int number) const { return pointer<int32_t>(lists_) + number * rows_; }

  const int64_t rows_;
  const int32_t* const stage_;
  const cudaStream_t stream_;
  const bool asks_;
  int64_t count_, since_ = 0;
  int list_ = -1, next_ = 0;  // of the two: the one in use, and the one that the next answer is about
  bool asked_ = false;
  Optional lists_, found_;
  Answer answer_;
};

void rnn_generate(int64_t mode, const Tensor& tokens, const Tensor& position, const Tensor& given, const Tensor& end,
                  const Tensor& status, const Tensor& h, const Optional& c, const Optional& seen,
                  const Tensor& embedding, const std::vector<Tensor>& weights, const Optional& projection,
                  const Tensor& output_weight, const Optional& output_bias, const Tensor& seed_offset,
                  double temperature, int64_t top_k, double top_p, double min_p, double repetition_penalty,
                  const Tensor& stop, int64_t steps, double norm_eps, double zoneout_c, double zoneout_h) {
  if (!takes(h)) {
    plain<std::tuple<>>("fastgen::rnn_generate", mode, tokens, position, given, end, status, h, c, seen, embedding,
                        weights, projection, output_weight, output_bias, seed_offset, temperature, top_k, top_p, min_p,
                        repetition_penalty, stop, steps, norm_eps, zoneout_c, zoneout_h);
    return;
  }
  GenerateArguments<Cuda> a(mode, tokens, position, given, end, status, h, c, seen, embedding, weights, projection,
                            output_weight, output_bias, seed_offset, temperature, top_k, top_p, min_p,
                            repetition_penalty, stop, norm_eps, zoneout_c, zoneout_h);
  if (a.rows == 0 || steps <= 0) return;
  const OnDevice device(h);
  const cudaStream_t stream = current_stream(h);
  const int64_t n = a.rows, hidden = a.hidden, state_size = n * hidden * int64_t(h.element_size());
  const int64_t state_sizes[] = {a.layers, n, hidden}, sum_sizes[] = {n, 8 * hidden};

  Drawing drawing(a.draw, n, h);
  const Tensor stage = torch::stable::new_empty(h, {n}, ScalarType::Int),
               fed = torch::stable::new_empty(h, {n}, ScalarType::Long),
               h_1 = Cuda::empty(h, h.scalar_type(), state_sizes, 3);
  Optional c_1, sums;
  if (a.lstm) c_1 = Cuda::empty(h, h.scalar_type(), state_sizes, 3);
  if (a.stack[0].p.norm_ih != nullptr) sums = torch::stable::new_empty(h, {sum_sizes, 2}, ScalarType::Float);
  drawing.p.logits = a.logits->p.y;
  drawing.p.seen = a.seen;
  drawing.p.seed_offset = a.seeds;

  GenerateParams p{};
  static_cast<Draw&>(p) = drawing.p;
  p.row_count = n;
  p.length = a.length;
  p.stops = a.stops;
  p.tokens = a.tokens;
  p.position = a.position;
  p.status = a.status;
  p.given = a.given;
  p.end = a.end;
  p.stop = a.stop;
  p.seen_to = a.seen;
  p.fed = integers(fed);
  p.stage = static_cast<int32_t*>(data_of(stage));
  p.h = {pointer<uint16_t>(h_1), reinterpret_cast<uint16_t*>(a.h)};
  p.c = {pointer<uint16_t>(c_1), reinterpret_cast<uint16_t*>(a.c)};
  p.layers = a.layers;
  p.row_words = hidden * int64_t(h.element_size()) / int64_t(sizeof(uint16_t));
  launch(begin_kernel, unsigned(ceil_div(n, kSliceThreads)), kSliceThreads, 0, stream, p);

  // What is the same for every token.
  std::vector<CellParams> layers;
  RowsOperand x = {a.words.data, a.words.stride, p.fed};
  for (int64_t l = 0; l < a.layers; ++l) {
    layers.push_back(a.stack[size_t(l)].p);
    CellParams& layer = layers.back();
    layer.input = x;
    layer.h = {a.h + l * state_size, hidden, nullptr};
    layer.h_1 = static_cast<char*>(data_of(h_1)) + l * state_size;
    if (a.lstm) {
      layer.c = {a.c + l * state_size, hidden, nullptr};
      layer.c_1 = static_cast<char*>(data_of(*c_1)) + l * state_size;
    }
    x = {layer.h_1, hidden, nullptr};
  }
  std::vector<LinearRowsParams> outputs;
  for (auto* output : {&a.project, &a.logits}) {
    if (!*output) continue;
    outputs.push_back((*output)->p);
    outputs.back().x = x;
    x = {outputs.back().y, outputs.back().outputs, nullptr};
  }

  RunningRows running(n, p.stage, h, stream);
  steps = std::min(steps, a.length - 1);  // no row has more to read
  for (int64_t step = 0; step < steps; ++step) {
    running.look();
    const int64_t count = running.count();
    if (count == 0) return;
    for (CellParams& layer : layers) {
      layer.batch = count;
      launch_step(layer, running.at_least(kReading), pointer<float>(sums), stream);
    }
    for (LinearRowsParams& output : outputs) {
      output.batch = count;
      launch_linear_rows(output, running.at_least(kDrawing), stream);
    }
    drawing.launch_slices(running.at_least(kDrawing), count, stream);
    p.rows = running.at_least(kReading);
    launch(advance_kernel, unsigned(count), drawing.threads(), drawing.shared_bytes(), stream, p);
  }
}

}  // namespace
}  // namespace fastgen

FASTGEN_CUDA_OPS(m) {
  m.impl("pick_tokens", TORCH_BOX(&fastgen::pick_tokens));
  m.impl("rnn_generate", TORCH_BOX(&fastgen::rnn_generate));
}
