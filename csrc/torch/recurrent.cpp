// fastgen::recurrent and its backward on the CPU: checks, memory, and how the work is split.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "cpu_rows.h"
#include "memory.h"
#include "recurrent_backward.h"
#include "recurrent_ops.h"
#include "team.h"
#include "tensor.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kRowsPerThread = 8;       // below this many, rows of a batch do not fill the tiles of a product
constexpr int64_t kRowsPerPart = 64;        // more do not help the products, and their states leave the cache
constexpr int64_t kLargeWeights = 1 << 22;  // bytes that no core keeps to itself from one step to the next
constexpr int64_t kStepShare = 1 << 15;     // multiply-adds of a step that are worth a thread of its own

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor out = empty_cpu(sizes.begin(), int64_t(sizes.size()), dtype);
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}
Tensor bytes(int64_t count) { return empty({count}, ScalarType::Byte); }

void* data_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// The arguments with what only the CPU's kernels read.
class Arguments : public RecurrentArguments {
 public:
  using RecurrentArguments::RecurrentArguments;

  // Layer norm and zoneout.
  void set(const Tensor& input, const Optional& norm_ih, const Optional& norm_hh, const Optional& norm_c,
           const Optional& norm_c_bias, const Optional& seed_offset, double norm_eps, double zoneout_c,
           double zoneout_h) {
    norm_.emplace(p, p.mode, p.hidden_size, Kind(input), norm_ih, norm_hh, norm_c, norm_c_bias);
    p.norm_eps = norm_eps;
    set_zoneout(p, p.mode, zoneout_c, zoneout_h);
    if (!seed_offset) return;
    STD_TORCH_CHECK(seed_offset->dim() == 1 && seed_offset->size(0) == 2 &&
                        seed_offset->scalar_type() == ScalarType::Long && seed_offset->is_cpu(),
                    "seed_offset: expected an int64 tensor (2,) on the CPU");
    const auto* words = static_cast<const int64_t*>(contiguous(seed_offset));
    p.zoneout_drawn = true;
    p.seed = uint64_t(words[0]);
    p.offset = uint64_t(words[1]);
  }

  // An uninitialised result with a row for each row of the input.
  Tensor empty_rows(int64_t width, ScalarType dtype) const {
    const std::vector<int64_t> sizes = rows_of(width);
    Tensor out = empty_cpu(sizes.data(), int64_t(sizes.size()), dtype);
    prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
    return out;
  }

 private:
  std::optional<NormOperands> norm_;
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

// Runs one phase of a kernel over its blocks.
template <class Work, class Params, class Phase>
void share_blocks(void (*kernel)(const Params&, const Work&), const Params& p, Phase phase, int64_t blocks,
                  int64_t threads, Work work = {}) {
  share(blocks, threads, [&](int64_t begin, int64_t end) {
    Work piece = work;
    piece.phase = phase;
    piece.first_block = begin;
    piece.end_block = end;
    kernel(p, piece);
  });
}

// Runs one block of a phase.
template <class Work, class Params, class Phase>
void run_block(void (*kernel)(const Params&, const Work&), const Params& p, Phase phase, int64_t block) {
  Work work{};
  work.phase = phase;
  work.first_block = block;
  work.end_block = block + 1;
  kernel(p, work);
}

// Runs the phase that takes some rows of the batch through all steps, over parts of about equal work.
template <class Work, class Params, class Sizes, class Phase>
void run_rows(void (*kernel)(const Params&, const Work&), Sizes (*sizes)(const Params&, int64_t), const Params& p,
              Phase phase, int64_t tokens, int64_t parts) {
  const std::vector<int64_t> cuts = cut_rows(p, tokens, std::max<int64_t>(parts, 1));
  const int64_t count = int64_t(cuts.size()) - 1;
  std::vector<int64_t> offset{0};
  for (int64_t i = 0; i < count; ++i) offset.push_back(offset.back() + sizes(p, cuts[i + 1] - cuts[i]).scratch);
  const Tensor scratch = bytes(offset.back());
  parallel(count, [&](int64_t i) {
    Work work{};
    work.phase = phase;
    work.first_row = cuts[i];
    work.end_row = cuts[i + 1];
    work.scratch = static_cast<char*>(data_of(scratch)) + offset[i];
    kernel(p, work);
  });
}

// How the recurrence is split: over parts of the rows of the batch, each of which runs through all steps by itself, or,
// where there are few rows or the weights are large, over the units of each step: then a thread reads only its share of
// the weights. The results do not depend on it.
struct Split {
  int64_t threads = torch::stable::get_num_threads();
  int64_t parts;    // of the rows
  int64_t sharing;  // threads that share a step

  Split(const RecurrentParams& p, int64_t blocks, int64_t packed)
      : parts(std::max((p.batch + kRowsPerPart - 1) / kRowsPerPart, std::min(threads, p.batch / kRowsPerThread))) {
    if (packed > kLargeWeights && p.batch <= kRowsPerPart) parts = 1;
    const int64_t work = p.batch * p.hidden_size * gate_count(p.mode) * p.output_size;
    sharing = parts > 1 ? 1 : std::clamp<int64_t>(work / kStepShare, 1, std::min(threads, blocks));
  }
};

void run(RecurrentParams& p) {
  const KernelTable& table = kernels();
  const RecurrentSizes sizes = table.recurrent_sizes(p, 0);
  const Split split(p, sizes.blocks, sizes.packed);
  const Tensor packed = bytes(sizes.packed);
  p.packed = data_of(packed);
  const int64_t panels = sizes.blocks + sizes.projection_blocks;
  if (split.sharing == 1) {
    share_blocks<RecurrentWork>(table.recurrent, p, RecurrentPhase::kPack, panels, split.threads);
    run_rows<RecurrentWork>(table.recurrent, table.recurrent_sizes, p, RecurrentPhase::kRows, p.rows, split.parts);
    return;
  }

  // Few rows and wide steps: all rows together, each step shared out by units.
  const RecurrentSizes all = table.recurrent_sizes(p, p.batch);
  const Tensor scratch = bytes(all.scratch);
  const auto pack = [&](int64_t i) { run_block<RecurrentWork>(table.recurrent, p, RecurrentPhase::kPack, i); };
  Team::run(split.sharing, panels, pack, [&](Team::Member member) {
    RecurrentWork work{};
    work.end_row = p.batch;
    work.scratch = data_of(scratch);
    const auto alone = [&](RecurrentPhase phase) {
      work.phase = phase;
      if (member.first()) table.recurrent(p, work);
    };
    const auto shared = [&](RecurrentPhase phase, int64_t blocks) {
      work.phase = phase;
      work.first_block = member.begin(blocks);
      work.end_block = member.end(blocks);
      table.recurrent(p, work);
    };
    alone(RecurrentPhase::kStart);
    for (int64_t s = 0; s < p.steps; s += all.chunk) {
      work.first_step = s;
      work.end_step = std::min(s + all.chunk, p.steps);
      alone(RecurrentPhase::kGather);
      member.meet();
      shared(RecurrentPhase::kInput, sizes.blocks);  // of the units whose steps follow on the same thread
      for (; work.first_step < work.end_step; ++work.first_step) {
        const auto phase = [&](RecurrentPhase which, int64_t blocks) {
          shared(which, blocks);
          member.meet();
        };
        phase(RecurrentPhase::kStep, sizes.blocks);
        if (by_rows(p)) phase(RecurrentPhase::kCells, p.batch);
        if (sizes.projection_blocks > 0) phase(RecurrentPhase::kProject, sizes.projection_blocks);
        if (by_rows(p) && sizes.projection_blocks > 0) phase(RecurrentPhase::kEmit, p.batch);
      }
    }
    alone(RecurrentPhase::kFinish);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent(
    int64_t mode, const Tensor& input, const Optional& batch_sizes, const Tensor& w_ih, const Tensor& w_hh,
    const Optional& b_ih, const Optional& b_hh, const Optional& w_hr, const Tensor& h_0, const Optional& c_0,
    const Optional& h_mask, bool batch_first, bool reverse, bool save, const Optional& norm_ih, const Optional& norm_hh,
    const Optional& norm_c, const Optional& norm_c_bias, const Optional& seed_offset, double norm_eps, double zoneout_c,
    double zoneout_h) {
  Arguments arguments(mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, batch_first, reverse);
  arguments.set(input, norm_ih, norm_hh, norm_c, norm_c_bias, seed_offset, norm_eps, zoneout_c, zoneout_h);
  RecurrentParams& p = arguments.p;
  const ScalarType dtype = arguments.dtype();
  const bool lstm = p.mode == CellMode::kLstm, gated = saved_gates(p) > 0;
  Tensor output = arguments.empty_rows(p.output_size, dtype);
  Tensor h_n = empty({p.batch, p.output_size}, dtype);
  Tensor c_n = lstm ? empty({p.batch, p.hidden_size}, dtype) : empty({0}, dtype);
  Tensor gates = save && gated ? arguments.empty_rows(saved_gates(p) * p.hidden_size, dtype) : empty({0}, dtype);
  Tensor cells =
      save && lstm ? arguments.empty_rows(p.hidden_size + saved_scales(p), arguments.work_dtype()) : empty({0}, dtype);
  if (p.batch == 0) return {output, h_n, c_n, gates, cells};
  p.output = data_of(output);
  p.h_n = data_of(h_n);
  p.c_n = lstm ? data_of(c_n) : nullptr;
  p.gates = save && gated ? data_of(gates) : nullptr;
  p.cells = save && lstm ? data_of(cells) : nullptr;
  run(p);
  return {output, h_n, c_n, gates, cells};
}

void run(RecurrentBackwardParams& p) {
  const KernelTable& table = kernels();
  const auto kernel = table.recurrent_backward;
  const RecurrentBackwardSizes sizes = table.recurrent_backward_sizes(p, 0);
  const Split split(p, sizes.blocks, sizes.packed);
  const Tensor packed = bytes(sizes.packed);
  p.packed = data_of(packed);
  using Phase = RecurrentBackwardPhase;
  using Work = RecurrentBackwardWork;
  if (split.sharing == 1) {
    share_blocks<Work>(kernel, p, Phase::kPack, sizes.panels, split.threads);
    run_rows<Work>(kernel, table.recurrent_backward_sizes, p, Phase::kRows, p.rows, split.parts);
  } else {
    const Tensor scratch = bytes(table.recurrent_backward_sizes(p, p.batch).scratch);
    const auto pack = [&](int64_t i) { run_block<Work>(kernel, p, Phase::kPack, i); };
    Team::run(split.sharing, sizes.panels, pack, [&](Team::Member member) {
      Work work{};
      work.end_row = p.batch;
      work.scratch = data_of(scratch);
      const auto alone = [&](Phase phase) {
        work.phase = phase;
        if (member.first()) kernel(p, work);
      };
      const auto shared = [&](Phase phase, int64_t blocks) {
        work.phase = phase;
        work.first_block = member.begin(blocks);
        work.end_block = member.end(blocks);
        kernel(p, work);
        member.meet();
      };
      alone(Phase::kStart);
      member.meet();
      for (work.first_step = p.steps - 1; work.first_step >= 0; --work.first_step) {
        if (by_rows(p) || p.w_hr != nullptr) shared(Phase::kReturn, sizes.blocks);
        if (by_rows(p) && p.w_hr != nullptr) shared(Phase::kEmit, p.batch);
        if (p.w_hr != nullptr) {
          shared(Phase::kStep, sizes.projection_blocks);
        } else if (!by_rows(p)) {
          shared(Phase::kStep, sizes.blocks);
        }
        if (by_rows(p)) shared(Phase::kCells, p.batch);
      }
      if (p.grad_h_0 != nullptr) shared(Phase::kReturn, sizes.blocks);
      alone(Phase::kFinish);
    });
  }

  if (p.grad_input != nullptr) {
    // In pieces of whole tiles, several a thread.
    const int64_t pieces = std::min(4 * split.threads, (p.rows + kRowsPerPart - 1) / kRowsPerPart);
    const Tensor scratch = bytes(pieces * sizes.input_scratch);
    parallel(pieces, [&](int64_t i) {
      Work work{};
      work.phase = Phase::kInput;
      work.first_row = p.rows * i / pieces;
      work.end_row = p.rows * (i + 1) / pieces;
      work.scratch = static_cast<char*>(data_of(scratch)) + i * sizes.input_scratch;
      kernel(p, work);
    });
  }

  const bool of_gates = p.grad_w_ih != nullptr || p.grad_w_hh != nullptr || p.grad_b_ih != nullptr ||
                        p.grad_b_hh != nullptr || p.grad_norm_ih != nullptr || p.grad_norm_hh != nullptr ||
                        p.grad_norm_c != nullptr || p.grad_norm_c_bias != nullptr;
  if (!of_gates && p.grad_w_hr == nullptr) return;
  const Tensor pointers = bytes(3 * p.rows * int64_t(sizeof(void*)));
  p.input_rows = static_cast<const void**>(data_of(pointers));
  p.state_rows = p.input_rows + p.rows;
  p.mask_rows = p.state_rows + p.rows;
  Work point{};
  point.phase = Phase::kPoint;
  point.end_step = p.steps;
  kernel(p, point);
  const int64_t gates = gate_count(p.mode) * p.hidden_size;
  const int64_t rows = gates + (p.grad_w_hr != nullptr ? p.output_size : 0);
  const int64_t first = of_gates ? 0 : gates;
  const int64_t pieces = std::min(split.threads, (rows - first + kRowsPerThread - 1) / kRowsPerThread);
  const Tensor scratch = bytes(pieces * sizes.weight_scratch);
  parallel(pieces, [&](int64_t i) {
    Work work{};
    work.phase = Phase::kWeights;
    work.first_block = first + (rows - first) * i / pieces;
    work.end_block = first + (rows - first) * (i + 1) / pieces;
    work.scratch = static_cast<char*>(data_of(scratch)) + i * sizes.weight_scratch;
    kernel(p, work);
  });
}

// A gradient summed in the work type, and rounded once to the dtype of its tensor.
struct Sum {
  Tensor result, sum;

  Sum(std::vector<int64_t> sizes, bool wanted, ScalarType dtype, ScalarType work)
      : result(empty_cpu(wanted ? sizes.data() : kNone, wanted ? int64_t(sizes.size()) : 1, dtype)),
        sum(wanted && work != dtype ? empty_cpu(sizes.data(), int64_t(sizes.size()), work) : result),
        wanted_(wanted) {}
  void* data() const { return wanted_ ? data_of(sum) : nullptr; }
  Tensor finish(bool zero) {
    if (zero) return torch::stable::zero_(result);
    if (sum.scalar_type() != result.scalar_type()) torch::stable::copy_(result, sum);
    return result;
  }

 private:
  static constexpr int64_t kNone[] = {0};
  bool wanted_;
};

}  // namespace

RecurrentGradients recurrent_backward(int64_t mode, const Optional& grad_output, const Optional& grad_h_n,
                                      const Optional& grad_c_n, const Tensor& input, const Optional& batch_sizes,
                                      const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih,
                                      const Optional& b_hh, const Optional& w_hr, const Tensor& h_0,
                                      const Optional& c_0, const Optional& h_mask, const Tensor& output,
                                      const Tensor& gates, const Tensor& cells, bool batch_first, bool reverse,
                                      int64_t needs, const Optional& norm_ih, const Optional& norm_hh,
                                      const Optional& norm_c, const Optional& norm_c_bias, const Optional& seed_offset,
                                      double norm_eps, double zoneout_c, double zoneout_h) {
  Arguments arguments(mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, batch_first, reverse);
  arguments.set(input, norm_ih, norm_hh, norm_c, norm_c_bias, seed_offset, norm_eps, zoneout_c, zoneout_h);
  RecurrentBackwardParams p{};
  static_cast<RecurrentParams&>(p) = arguments.p;
  const ScalarType dtype = arguments.dtype(), work = arguments.work_dtype();
  const auto needed = [&](int i) { return bool(needs >> i & 1); };
  const auto rounded = [&](int64_t rows, int64_t columns, bool wanted) {
    return Sum({rows, columns}, wanted, dtype, dtype);
  };
  const int64_t rows = w_hh.size(0);
  Tensor grad_input = needed(0) ? arguments.empty_rows(p.input_size, dtype) : empty({0}, dtype);
  Sum grad_w_ih({rows, p.input_size}, needed(1), dtype, work), grad_w_hh({rows, p.output_size}, needed(2), dtype, work),
      grad_b_ih({rows}, needed(3) && b_ih, dtype, work), grad_b_hh({rows}, needed(4) && b_hh, dtype, work),
      grad_w_hr({p.output_size, p.hidden_size}, needed(5) && w_hr, dtype, work),
      grad_norm_ih({rows}, needed(8) && norm_ih, dtype, work), grad_norm_hh({rows}, needed(9) && norm_ih, dtype, work),
      grad_norm_c({p.hidden_size}, needed(10) && norm_ih, dtype, work),
      grad_norm_c_bias({p.hidden_size}, needed(11) && norm_ih, dtype, work);
  Sum grad_h_0 = rounded(p.batch, p.output_size, needed(6)),
      grad_c_0 = rounded(p.batch, p.hidden_size, needed(7) && c_0);
  const auto results = [&] {
    const bool empty = p.batch == 0;
    return RecurrentGradients(grad_input, grad_w_ih.finish(empty), grad_w_hh.finish(empty), grad_b_ih.finish(empty),
                              grad_b_hh.finish(empty), grad_w_hr.finish(empty), grad_h_0.finish(empty),
                              grad_c_0.finish(empty), grad_norm_ih.finish(empty), grad_norm_hh.finish(empty),
                              grad_norm_c.finish(empty), grad_norm_c_bias.finish(empty));
  };
  if (p.batch == 0) return results();

  arguments.check_rows("grad_output", grad_output, input, p.output_size, dtype);
  arguments.check_rows("output", output, input, p.output_size, dtype);
  if (saved_gates(p) > 0) arguments.check_rows("gates", gates, input, saved_gates(p) * p.hidden_size, dtype);
  if (p.mode == CellMode::kLstm) arguments.check_rows("cells", cells, input, p.hidden_size + saved_scales(p), work);
  check_shape("grad_h_n", grad_h_n, input, {p.batch, p.output_size});
  check_shape("grad_c_n", grad_c_n, input, {p.batch, p.hidden_size});

  if (grad_output) p.grad_output = arguments.rows(*grad_output, p.grad_step, p.grad_batch);
  p.grad_h_n = arguments.contiguous(grad_h_n);
  p.grad_c_n = arguments.contiguous(grad_c_n);
  // Read only: the pointers of the base are those that the forward pass writes.
  p.output = const_cast<void*>(arguments.contiguous(output));
  p.gates = const_cast<void*>(arguments.contiguous(gates));
  p.cells = const_cast<void*>(arguments.contiguous(cells));

  // A vector may be read behind the last element.
  constexpr int64_t kSlack = 64;
  const int64_t size = int64_t(input.element_size());
  const Tensor grad_gates = bytes(p.rows * gate_gradients(p) * p.hidden_size * size + kSlack);
  p.grad_gates = data_of(grad_gates);
  Optional hidden, grad_hidden;
  if (w_hr && needed(5)) {
    hidden = bytes(p.rows * p.hidden_size * size);
    grad_hidden = bytes(p.rows * p.output_size * size + kSlack);
    p.hidden = data_of(*hidden);
    p.grad_hidden = data_of(*grad_hidden);
  }
  p.grad_input = needed(0) ? data_of(grad_input) : nullptr;
  p.grad_w_ih = grad_w_ih.data();
  p.grad_w_hh = grad_w_hh.data();
  p.grad_b_ih = grad_b_ih.data();
  p.grad_b_hh = grad_b_hh.data();
  p.grad_w_hr = grad_w_hr.data();
  p.grad_norm_ih = grad_norm_ih.data();
  p.grad_norm_hh = grad_norm_hh.data();
  p.grad_norm_c = grad_norm_c.data();
  p.grad_norm_c_bias = grad_norm_c_bias.data();
  p.grad_h_0 = grad_h_0.data();
  p.grad_c_0 = grad_c_0.data();
  run(p);
  return results();
}

}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("recurrent", TORCH_BOX(&fastgen::recurrent));
  m.impl("recurrent_backward", TORCH_BOX(&fastgen::recurrent_backward));
}
