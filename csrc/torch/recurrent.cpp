// fastgen::recurrent and its backward on the CPU: checks, memory, and how the work is split.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "memory.h"
#include "tensor.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kRowsPerThread = 8;     // below this many, rows of a batch do not fill the tiles of a product
constexpr int64_t kRowsPerPart = 64;      // more do not help the products, and their states leave the cache
constexpr int64_t kSharedStep = 1 << 17;  // multiply-adds of a step from which on several threads share it

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor out = empty_cpu(sizes.begin(), int64_t(sizes.size()), dtype);
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}
Tensor bytes(int64_t count) { return empty({count}, ScalarType::Byte); }

void* data_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// The steps of a call: padded (T, B, ...) or (B, T, ...), or packed (N, ...).
struct Steps {
  int64_t count, batch;
  std::vector<int64_t> sizes, rows;  // packed only: rows of each step, and the number of its first
  std::vector<int64_t> leading;      // dimensions of the results before the last

  Steps(const Tensor& input, const Optional& batch_sizes, int64_t batch_of_h, bool batch_first) : batch(batch_of_h) {
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

void check_shape(const char* name, const Optional& tensor, const Tensor& like, std::initializer_list<int64_t> sizes) {
  if (!tensor) return;
  bool fits = tensor->dim() == int64_t(sizes.size()) && tensor->scalar_type() == like.scalar_type() && tensor->is_cpu();
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = tensor->size(int64_t(d)) == sizes.begin()[d];
  STD_TORCH_CHECK(fits, name, ": expected the dtype of input and a shape that fits the other arguments");
}

// The arguments of both directions as RecurrentParams. Holds the contiguous copies that a stride asked for.
class Arguments {
 public:
  RecurrentParams p{};

  Arguments(int64_t mode, const Tensor& input, const Optional& batch_sizes, const Tensor& w_ih, const Tensor& w_hh,
            const Optional& b_ih, const Optional& b_hh, const Optional& w_hr, const Tensor& h_0, const Optional& c_0,
            const Optional& h_mask, bool batch_first, bool reverse)
      : steps_(input, batch_sizes, h_0.dim() == 2 ? h_0.size(0) : -1, batch_first), dtype_(input.scalar_type()) {
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
    const bool unit = p.input_size == 1 || input.stride(input.dim() - 1) == 1;
    const Tensor& in = unit ? input : keep(torch::stable::contiguous(input));
    p.input = in.const_data_ptr();
    p.input_batch = in.stride(batch_sizes || batch_first ? 0 : 1);
    p.input_step = batch_sizes ? 0 : in.stride(batch_first ? 1 : 0);
    p.w_ih = contiguous(w_ih);
    p.w_hh = contiguous(w_hh);
    p.b_ih = contiguous(b_ih);
    p.b_hh = contiguous(b_hh);
    p.w_hr = contiguous(w_hr);
    p.h_0 = contiguous(h_0);
    p.c_0 = contiguous(c_0);
    p.h_mask = contiguous(h_mask);
  }

  // An uninitialised result with a row for each row of the input.
  Tensor rows_of(int64_t width, ScalarType dtype) const {
    std::vector<int64_t> sizes = steps_.leading;
    sizes.push_back(width);
    Tensor out = empty_cpu(sizes.data(), int64_t(sizes.size()), dtype);
    prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
    return out;
  }
  ScalarType dtype() const { return dtype_; }
  ScalarType work_dtype() const { return dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  // Rows of all steps: the measure of the work.
  int64_t tokens() const { return steps_.rows.empty() ? p.steps * p.batch : steps_.rows.back() + steps_.sizes.back(); }

  const void* contiguous(const Optional& tensor) {
    if (!tensor) return nullptr;
    return keep(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor)).const_data_ptr();
  }

 private:
  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  Steps steps_;
  ScalarType dtype_;
  std::vector<Tensor> kept_;
};

// Cuts the rows of the batch into parts of about equal work, at least `parts` where there are as many rows.
std::vector<int64_t> cut_rows(const RecurrentParams& p, int64_t tokens, int64_t parts) {
  std::vector<int64_t> cuts{0};
  int64_t length = p.steps, done = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    while (length > 0 && p.batch_sizes != nullptr && p.batch_sizes[length - 1] <= b) --length;
    done += length;
    if (done * parts >= tokens * int64_t(cuts.size()) || b + 1 == p.batch) cuts.push_back(b + 1);
  }
  return cuts;
}

// Runs body(i) for i < count, on as many threads as there are.
template <class Body>
void parallel(int64_t count, const Body& body) {
  if (count == 1) return body(0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Runs body(begin, end) over [0, count), in one piece a thread.
template <class Body>
void share(int64_t count, int64_t threads, const Body& body) {
  if (threads == 1) return body(0, count);
  torch::stable::parallel_for(0, count, (count + threads - 1) / threads, body);
}

void run(RecurrentParams& p, int64_t tokens) {
  const KernelTable& table = kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts =
      std::max((p.batch + kRowsPerPart - 1) / kRowsPerPart, std::min(threads, p.batch / kRowsPerThread));
  const RecurrentSizes sizes = table.recurrent_sizes(p, 0);
  const Tensor packed = bytes(sizes.packed);
  p.packed = data_of(packed);
  const int64_t step_work = p.batch * p.hidden_size * gate_count(p.mode) * p.output_size;
  const int64_t sharing = parts > 1 || step_work < kSharedStep ? 1 : std::min(threads, sizes.blocks);

  RecurrentWork pack{};
  pack.phase = RecurrentPhase::kPack;
  share(sizes.blocks + sizes.projection_blocks, threads, [&](int64_t begin, int64_t end) {
    RecurrentWork piece = pack;
    piece.first_block = begin;
    piece.end_block = end;
    table.recurrent(p, piece);
  });

  if (sharing == 1) {
    const std::vector<int64_t> cuts = cut_rows(p, tokens, std::max<int64_t>(parts, 1));
    const int64_t count = int64_t(cuts.size()) - 1;
    std::vector<int64_t> offset{0};
    for (int64_t i = 0; i < count; ++i) {
      offset.push_back(offset.back() + table.recurrent_sizes(p, cuts[i + 1] - cuts[i]).scratch);
    }
    const Tensor scratch = bytes(offset.back());
    parallel(count, [&](int64_t i) {
      RecurrentWork work{};
      work.phase = RecurrentPhase::kRows;
      work.first_row = cuts[i];
      work.end_row = cuts[i + 1];
      work.scratch = static_cast<char*>(data_of(scratch)) + offset[i];
      table.recurrent(p, work);
    });
    return;
  }

  // Few rows and wide steps: all rows together, each step shared out by units.
  const RecurrentSizes all = table.recurrent_sizes(p, p.batch);
  const Tensor scratch = bytes(all.scratch);
  RecurrentWork work{};
  work.end_row = p.batch;
  work.scratch = data_of(scratch);
  const auto serial = [&](RecurrentPhase phase) {
    work.phase = phase;
    table.recurrent(p, work);
  };
  const auto shared = [&](RecurrentPhase phase, int64_t blocks) {
    share(blocks, sharing, [&](int64_t begin, int64_t end) {
      RecurrentWork piece = work;
      piece.phase = phase;
      piece.first_block = begin;
      piece.end_block = end;
      table.recurrent(p, piece);
    });
  };
  serial(RecurrentPhase::kStart);
  for (int64_t s = 0; s < p.steps; s += all.chunk) {
    work.first_step = s;
    work.end_step = std::min(s + all.chunk, p.steps);
    serial(RecurrentPhase::kGather);
    shared(RecurrentPhase::kInput, sizes.blocks);
    for (; work.first_step < work.end_step; ++work.first_step) {
      shared(RecurrentPhase::kStep, sizes.blocks);
      if (sizes.projection_blocks > 0) shared(RecurrentPhase::kProject, sizes.projection_blocks);
    }
  }
  serial(RecurrentPhase::kFinish);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent(
    int64_t mode, const Tensor& input, const Optional& batch_sizes, const Tensor& w_ih, const Tensor& w_hh,
    const Optional& b_ih, const Optional& b_hh, const Optional& w_hr, const Tensor& h_0, const Optional& c_0,
    const Optional& h_mask, bool batch_first, bool reverse, bool save) {
  Arguments arguments(mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, batch_first, reverse);
  RecurrentParams& p = arguments.p;
  const ScalarType dtype = arguments.dtype();
  const bool lstm = p.mode == CellMode::kLstm, gated = saved_gates(p.mode) > 0;
  Tensor output = arguments.rows_of(p.output_size, dtype);
  Tensor h_n = empty({p.batch, p.output_size}, dtype);
  Tensor c_n = lstm ? empty({p.batch, p.hidden_size}, dtype) : empty({0}, dtype);
  Tensor gates = save && gated ? arguments.rows_of(4 * p.hidden_size, dtype) : empty({0}, dtype);
  Tensor cells = save && lstm ? arguments.rows_of(p.hidden_size, arguments.work_dtype()) : empty({0}, dtype);
  if (p.batch == 0) return {output, h_n, c_n, gates, cells};
  p.output = data_of(output);
  p.h_n = data_of(h_n);
  p.c_n = lstm ? data_of(c_n) : nullptr;
  p.gates = save && gated ? data_of(gates) : nullptr;
  p.cells = save && lstm ? data_of(cells) : nullptr;
  run(p, arguments.tokens());
  return {output, h_n, c_n, gates, cells};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("recurrent", TORCH_BOX(&fastgen::recurrent)); }
