// fastgen::recurrent and recurrent_backward on CUDA: fastgen/reference/recurrent.py, one kernel for all steps.
//
// The input's products are one matrix product of torch for all steps. What remains is a chain of steps, each of which
// waits for the whole h of the one before: so a cooperative kernel runs through all of them, each of its blocks has
// some units with their rows of W_hh in shared memory for good, and between two steps the blocks meet at a barrier
// (Diamos et al., "Persistent RNNs: stashing recurrent weights on-chip", 2016). Rows of the batch are independent of
// each other: where there are few units, groups of blocks take different ones, each with a barrier of its own.
//
// A product needs all units of its operand, and so a barrier before it; layer norm needs the statistics of a row, and
// so a barrier before each use. A step has the barriers
//   forward    W_hh h | [norm of it] | [norm of c'] | [W_hr h] |
//   backward   W_hh^T dgates | [W_hr^T dh] | [norm of c'] | [norm of W_hh h] |
// The operand of the backward product is as wide as all gates: where blocks come in clusters, they share reading it.
// Between barriers each thread takes "its" units and rows, always the same ones: what it keeps for itself from step to
// step (c, h, dh, dc) needs no barrier.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../torch/recurrent_ops.h"
#include "check.h"
#include "recurrent_backward.inl"
#include "recurrent_forward.inl"
#include "recurrent_rows.inl"
#include "upload.h"

namespace fastgen {
namespace {

using Optional = std::optional<Tensor>;

// What runs before and after the kernel of a sequence, in one place for both directions.
class Sequencer {
 public:
  Sequencer(RecurrentArguments& arguments, const Tensor& like)
      : arguments_(arguments), like_(like), device_(like), stream_(current_stream(like)) {}

  cudaStream_t stream() const { return stream_; }
  int64_t element_size() const { return int64_t(like_.element_size()); }

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const {
    return torch::stable::new_empty(like_, {sizes.data(), sizes.size()}, dtype);
  }
  Tensor empty(const std::vector<int64_t>& sizes) const { return empty(sizes, arguments_.dtype()); }
  // Memory for the time of this call. torch gives it out again in the order of the stream.
  float* scratch(int64_t rows, int64_t columns) {
    return static_cast<float*>(keep(empty({rows, columns}, ScalarType::Float)));
  }
  void* keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return data_of(kept_.back());
  }

  // The rows of a tensor as a matrix, outside of any graph.
  Tensor matrix(const Tensor& tensor) const {
    const Tensor plain = detached(tensor);
    const int64_t sizes[] = {arguments_.p.rows, tensor.size(tensor.dim() - 1)};
    return torch::stable::reshape(plain, {sizes, 2});
  }

  // Layer norm and zoneout.
  void set(CellOptions& p, const Optional& norm_ih, const Optional& norm_hh, const Optional& norm_c,
           const Optional& norm_c_bias, double norm_eps, double zoneout_c, double zoneout_h) {
    const RecurrentParams& r = arguments_.p;
    const bool lstm = r.mode == CellMode::kLstm, norm = norm_ih.has_value();
    STD_TORCH_CHECK(
        norm == norm_hh.has_value() && norm == norm_c.has_value() && norm == norm_c_bias.has_value() && (lstm || !norm),
        "norm_ih, norm_hh, norm_c, norm_c_bias: expected all or none, and none but for an LSTM");
    STD_TORCH_CHECK(zoneout_c >= 0 && zoneout_c <= 1 && zoneout_h >= 0 && zoneout_h <= 1 && (lstm || zoneout_c == 0),
                    "zoneout_c, zoneout_h: expected probabilities, and 0 for c where there is none, got ", zoneout_c,
                    " and ", zoneout_h);
    const auto gain = [&](const char* name, const Optional& tensor, int64_t size) {
      check_shape(name, tensor, like_, {size});
      return arguments_.contiguous(tensor);
    };
    p.norm_ih = gain("norm_ih", norm_ih, 4 * r.hidden_size);
    p.norm_hh = gain("norm_hh", norm_hh, 4 * r.hidden_size);
    p.norm_c = gain("norm_c", norm_c, r.hidden_size);
    p.norm_c_bias = gain("norm_c_bias", norm_c_bias, r.hidden_size);
    p.norm_eps = norm_eps;
    p.zoneout_c = zoneout_c;
    p.zoneout_h = zoneout_h;
  }

  // What the kernels of both directions need beyond their arguments.
  template <class Params>
  void prepare(Sequence<Params>& p, const Optional& seed_offset) {
    if (p.batch_sizes != nullptr) {
      std::vector<int64_t> steps(p.batch_sizes, p.batch_sizes + p.steps);
      steps.insert(steps.end(), p.step_rows, p.step_rows + p.steps);
      const auto* uploaded = static_cast<const int64_t*>(keep(upload(steps, like_)));
      p.batch_sizes = uploaded;
      p.step_rows = uploaded + p.steps;
    }
    const auto zone = [](double share, int64_t first) {
      return Zone{share > 0, float(share), uint64_t(std::nearbyint(share * 0x1p32)), uint64_t(first)};
    };
    p.zone_c = zone(p.zoneout_c, 0);
    p.zone_h = zone(p.zoneout_h, p.mode == CellMode::kLstm ? p.rows * p.hidden_size : 0);
    if (seed_offset) {
      check_seed_offset(*seed_offset, 1);
      STD_TORCH_CHECK(same_device(*seed_offset, like_), "seed_offset: expected a tensor on the device of input");
      p.seed_offset = static_cast<const int64_t*>(arguments_.contiguous(seed_offset));
    }
    p.h = scratch(p.batch, p.output_size);
    if (p.mode == CellMode::kLstm) p.c = scratch(p.batch, p.hidden_size);
  }

  // A product whose operand has `halves` halves; its matrix comes from `source`, whose strides these are.
  Product product(int64_t units, int64_t width, int groups, int halves, const void* source, int64_t group_stride,
                  int64_t unit_stride, int64_t stride) {
    Product out{};
    out.units = units;
    out.width = width;
    out.batch = arguments_.p.batch;
    out.groups = groups;
    out.chunks = int(ceil_div(width * element_size(), kChunk));
    out.tiles = int(ceil_div(units, kUnits));
    const int64_t operand = halves * out.batch * out.operand_pitch(), matrix = out.tiles * out.tile_bytes();
    out.operand = static_cast<unsigned char*>(keep(torch::stable::new_zeros(like_, {&operand, 1}, ScalarType::Byte)));
    out.matrix = static_cast<unsigned char*>(keep(empty({matrix}, ScalarType::Byte)));
    by_element(arguments_.p.dtype, [&](auto element) {
      using Element = decltype(element);
      const PackParams<Element> p{static_cast<const Element*>(source), group_stride, unit_stride, stride, out};
      launch(pack_kernel<Element>, unsigned(out.tiles * out.groups), kThreads, 0, stream_, p);
    });
    return out;
  }

  // clusters: where there are any, blocks share what the product with the recurrent matrix reads.
  template <class Params>
  void launch_sequence(void (*kernel)(Params), Params& p, bool clusters) {
    deal(p, multiprocessors(), 1);
    const bool many = p.recurrent.tiles >= kCluster && p.recurrent.part_chunks() <= kWarps * kStages;
    const int room = clusters && many ? clusters_at_once(kernel, kCluster, kThreads, shared_limit()) * kCluster : 0;
    if (room > 0) {
      Params other = p;
      other.recurrent.clusters = true;
      deal(other, room, kCluster);
      if (other.recurrent.shared >= 0 && cycles(other) <= cycles(p)) p = other;
    }
    const int64_t counters = int64_t(p.groups) * kLine;
    p.arrived = static_cast<uint32_t*>(keep(torch::stable::new_zeros(like_, {&counters, 1}, ScalarType::Int)));
    const auto blocks = unsigned(p.unit_blocks * p.groups);
    const auto shared = size_t(p.shared.bytes);
    if (p.recurrent.clusters) {
      launch_clusters(kernel, blocks, kCluster, kThreads, shared, stream_, p);
    } else {
      launch_cooperative(kernel, blocks, kThreads, shared, stream_, p);
    }
  }

  unsigned row_blocks(int64_t warps) const {
    return unsigned(std::min<int64_t>(ceil_div(warps, kRowThreads / 32), 16 * multiprocessors()));
  }

 private:
  // Units over `room` multiprocessors in multiples of `unit` blocks, and rows of the batch over what remains. Of a
  // large batch a block reads less for all its steps where it has more units and fewer rows.
  template <class Params>
  void deal(Params& p, int room, int unit) const {
    const int most = std::max(p.recurrent.tiles, p.projection.tiles), least = int(ceil_div(most, room));
    Params best = p;
    for (int tiles = least; tiles <= most; ++tiles) {
      p.unit_blocks = int(ceil_div(ceil_div(most, tiles), unit)) * unit;
      p.groups = int(std::max<int64_t>(1, std::min<int64_t>(room / p.unit_blocks, ceil_div(p.batch, kRows))));
      p.recurrent.tiles_of_block = int(ceil_div(p.recurrent.tiles, p.unit_blocks));
      p.projection.tiles_of_block = int(ceil_div(p.projection.tiles, p.unit_blocks));
      arrange(p);
      const bool resident = p.recurrent.shared >= 0 && (p.projection.tiles == 0 || p.projection.shared >= 0);
      if (tiles == least || (resident && cycles(p) < cycles(best))) best = p;
      if (!resident) break;
    }
    p = best;
  }

  // What the recurrent product of a step costs a block, about: its matrix from shared memory at 128 bytes a cycle, and
  // the operand from L2, of which a multiprocessor has some 24 bytes a cycle where all read.
  template <class Params>
  int64_t cycles(const Sequence<Params>& p) const {
    const Product& of = p.recurrent;
    const int64_t row_tiles = ceil_div(ceil_div(p.batch, kRows), p.groups);
    const int64_t operand = kRows * of.operand_pitch() / (of.clusters ? kCluster : 1);
    return row_tiles * (of.resident_bytes() / 128 + (of.stays(p.shared) ? 1 : of.tiles_of_block) * operand / 24);
  }

  // Which matrices stay on the chip, and where everything stands there.
  template <class Params>
  void arrange(Sequence<Params>& p) const {
    const int64_t limit = int64_t(shared_limit());
    const int64_t sums = int64_t(sizeof(float)) * kWarps * kGroupsMost * kUnits * kSumPitch;
    int64_t first = p.recurrent.resident_bytes(), second = p.projection.resident_bytes();
    p.shared.warps = kWarps;
    p.shared.stage = kStageOperand;
    const auto rings = [&] { return int64_t(p.shared.warps) * kStages * p.shared.stage; };
    if (first + second + rings() + sums > limit) {
      p.shared.warps = kWarpsStreamed;
      p.shared.stage = kStageStreamed;
      const bool one = first + rings() + sums <= limit, other = second + rings() + sums <= limit;
      second = other && !one ? second : 0;
      first = one ? first : 0;
    }
    p.recurrent.shared = first > 0 ? 0 : -1;
    p.projection.shared = second > 0 ? int(first) : -1;
    p.shared.rings = int(first + second);
    p.shared.sums = p.shared.rings + int(rings());
    p.shared.bytes = p.shared.sums + int(sums);
  }

  RecurrentArguments& arguments_;
  const Tensor& like_;
  OnDevice device_;
  cudaStream_t stream_;
  std::vector<Tensor> kept_;
};

// Whether the kernels take a call; the rest goes to the reference.
bool takes(const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results recurrent(int64_t mode, const Tensor& input, const Optional& batch_sizes, const Tensor& w_ih,
                  const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, const Optional& w_hr,
                  const Tensor& h_0, const Optional& c_0, const Optional& h_mask, bool batch_first, bool reverse,
                  bool save, const Optional& norm_ih, const Optional& norm_hh, const Optional& norm_c,
                  const Optional& norm_c_bias, const Optional& seed_offset, double norm_eps, double zoneout_c,
                  double zoneout_h) {
  if (!takes(input)) {
    return plain<Results>("fastgen::recurrent", mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0,
                          h_mask, batch_first, reverse, save, norm_ih, norm_hh, norm_c, norm_c_bias, seed_offset,
                          norm_eps, zoneout_c, zoneout_h);
  }
  RecurrentArguments arguments(mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, batch_first,
                               reverse);
  Sequencer call(arguments, input);
  ForwardParams p{};
  static_cast<RecurrentParams&>(p) = arguments.p;
  call.set(p, norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps, zoneout_c, zoneout_h);
  const bool lstm = p.mode == CellMode::kLstm, gated = saved_gates(p) > 0, norm = norm_ih.has_value();
  const int64_t units = p.hidden_size, outputs = p.output_size;
  Tensor output = call.empty(arguments.rows_of(outputs)), h_n = call.empty({p.batch, outputs});
  Tensor c_n = lstm ? call.empty({p.batch, units}) : call.empty({0});
  Tensor gates = save && gated ? call.empty(arguments.rows_of(saved_gates(p) * units)) : call.empty({0});
  Tensor cells =
      save && lstm ? call.empty(arguments.rows_of(units + saved_scales(p)), ScalarType::Float) : call.empty({0});
  if (p.batch == 0) return {output, h_n, c_n, gates, cells};
  p.output = data_of(output);
  p.h_n = data_of(h_n);
  p.c_n = lstm ? data_of(c_n) : nullptr;
  p.gates = save && gated ? data_of(gates) : nullptr;
  p.cells = save && lstm ? data_of(cells) : nullptr;

  const Tensor from_input = call.empty({p.rows, w_ih.size(0)});
  multiply_into(from_input, call.matrix(input), transposed(detached(w_ih)));
  p.from_input = data_of(from_input);
  call.prepare(p, seed_offset);
  p.recurrent = call.product(units, outputs, gate_count(p.mode), 2, p.w_hh, units * outputs, outputs, 1);
  if (w_hr) p.projection = call.product(outputs, units, 1, 1, p.w_hr, 0, units, 1);
  if (norm) {
    p.sums = call.scratch(p.batch, 4 * units);
    p.proposed = call.scratch(p.batch, units);
    p.gate_moments = reinterpret_cast<float2*>(call.scratch(p.batch, 2 * p.recurrent.tiles));
    p.cell_moments = reinterpret_cast<float2*>(call.scratch(p.batch, 2 * p.recurrent.tiles));
  }
  by_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (norm) {
      launch(standardise_kernel<Element>, call.row_blocks(p.rows), kRowThreads, 0, call.stream(), p,
             static_cast<Element*>(data_of(from_input)));
    }
    by_gates(p.mode,
             [&](auto gates) { call.launch_sequence(forward_kernel<Element, decltype(gates)::value>, p, false); });
  });
  return {output, h_n, c_n, gates, cells};
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients recurrent_backward(int64_t mode, const Optional& grad_output, const Optional& grad_h_n,
                             const Optional& grad_c_n, const Tensor& input, const Optional& batch_sizes,
                             const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                             const Optional& w_hr, const Tensor& h_0, const Optional& c_0, const Optional& h_mask,
                             const Tensor& output, const Tensor& gates, const Tensor& cells, bool batch_first,
                             bool reverse, int64_t needs, const Optional& norm_ih, const Optional& norm_hh,
                             const Optional& norm_c, const Optional& norm_c_bias, const Optional& seed_offset,
                             double norm_eps, double zoneout_c, double zoneout_h) {
  if (!takes(input)) {
    return plain<Gradients>("fastgen::recurrent_backward", mode, grad_output, grad_h_n, grad_c_n, input, batch_sizes,
                            w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, output, gates, cells, batch_first, reverse,
                            needs, norm_ih, norm_hh, norm_c, norm_c_bias, seed_offset, norm_eps, zoneout_c, zoneout_h);
  }
  RecurrentArguments arguments(mode, input, batch_sizes, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, h_mask, batch_first,
                               reverse);
  Sequencer call(arguments, input);
  BackwardParams p{};
  static_cast<RecurrentParams&>(p) = arguments.p;
  call.set(p, norm_ih, norm_hh, norm_c, norm_c_bias, norm_eps, zoneout_c, zoneout_h);
  const ScalarType dtype = arguments.dtype();
  const int64_t units = p.hidden_size, outputs = p.output_size, columns = w_hh.size(0);
  const bool lstm = p.mode == CellMode::kLstm, gated = saved_gates(p) > 0, norm = norm_ih.has_value();
  arguments.check_rows("grad_output", grad_output, input, outputs, dtype);
  arguments.check_rows("output", output, input, outputs, dtype);
  if (gated) arguments.check_rows("gates", gates, input, saved_gates(p) * units, dtype);
  if (lstm) arguments.check_rows("cells", cells, input, units + saved_scales(p), ScalarType::Float);
  check_shape("grad_h_n", grad_h_n, input, {p.batch, outputs});
  check_shape("grad_c_n", grad_c_n, input, {p.batch, units});

  const auto result = [&](int bit, const Optional& of) {
    if (!(needs >> bit & 1) || !of) return call.empty({0});
    const auto sizes = of->sizes();
    return call.empty({sizes.begin(), sizes.end()});
  };
  Tensor grad_input = result(0, input), grad_w_ih = result(1, w_ih), grad_w_hh = result(2, w_hh),
         grad_b_ih = result(3, b_ih), grad_b_hh = result(4, b_hh), grad_w_hr = result(5, w_hr),
         grad_h_0 = result(6, h_0), grad_c_0 = result(7, c_0), grad_norm_ih = result(8, norm_ih),
         grad_norm_hh = result(9, norm_hh), grad_norm_c = result(10, norm_c),
         grad_norm_c_bias = result(11, norm_c_bias);
  const auto needed = [&](int bit, const Optional& of) { return bool(needs >> bit & 1) && of.has_value(); };
  const Gradients results{grad_input, grad_w_ih, grad_w_hh,    grad_b_ih,    grad_b_hh,   grad_w_hr,
                          grad_h_0,   grad_c_0,  grad_norm_ih, grad_norm_hh, grad_norm_c, grad_norm_c_bias};
  if (p.batch == 0) {
    std::apply([](auto... grads) { (torch::stable::zero_(grads), ...); }, results);
    return results;
  }

  if (grad_output) p.grad_output = arguments.rows(*grad_output, p.grad_step, p.grad_batch);
  p.grad_h_n = arguments.contiguous(grad_h_n);
  p.grad_c_n = arguments.contiguous(grad_c_n);
  // Read only: the pointers of the base are those that the forward pass writes.
  p.output = const_cast<void*>(arguments.contiguous(output));
  p.gates = const_cast<void*>(arguments.contiguous(gates));
  p.cells = const_cast<void*>(arguments.contiguous(cells));
  p.grad_h_0 = needed(6, h_0) ? data_of(grad_h_0) : nullptr;
  p.grad_c_0 = needed(7, c_0) ? data_of(grad_c_0) : nullptr;

  const auto matrix_of = [&](int64_t width, ScalarType type) { return call.empty({p.rows, width}, type); };
  const bool two = norm || p.mode == CellMode::kGru;
  const Tensor grad_hh = matrix_of(columns, dtype), grad_ih = two ? matrix_of(columns, dtype) : grad_hh;
  p.grad_gates_hh = data_of(grad_hh);
  p.grad_gates_ih = data_of(grad_ih);
  Optional hidden, grad_hidden, c_hat, to_gates, behind_norm;
  if (needed(5, w_hr)) {
    hidden = matrix_of(units, dtype);
    grad_hidden = matrix_of(outputs, dtype);
    p.hidden = data_of(*hidden);
    p.grad_hidden = data_of(*grad_hidden);
  }
  call.prepare(p, seed_offset);
  p.recurrent = call.product(outputs, columns, 1, 2, p.w_hh, 0, 1, outputs);
  if (w_hr) p.projection = call.product(units, outputs, 1, 1, p.w_hr, 0, 1, units);
  if (norm) {
    c_hat = matrix_of(units, ScalarType::Float);
    to_gates = matrix_of(columns, ScalarType::Float);
    behind_norm = matrix_of(units, ScalarType::Float);
    float* c_scale = call.scratch(p.rows, 1);
    p.c_hat = static_cast<const float*>(data_of(*c_hat));
    p.c_scale = c_scale;
    p.to_gates = static_cast<float*>(data_of(*to_gates));
    p.behind_norm = static_cast<float*>(data_of(*behind_norm));
    const int64_t tiles = ceil_div(units, kUnits);
    p.cell_sums = reinterpret_cast<float2*>(call.scratch(p.batch, 2 * tiles));
    p.gate_sums = reinterpret_cast<float2*>(call.scratch(p.batch, 2 * tiles));
    by_element(p.dtype, [&](auto element) {
      launch(cells_kernel<decltype(element)>, call.row_blocks(p.steps * p.batch), kRowThreads, 0, call.stream(), p,
             static_cast<float*>(data_of(*c_hat)), c_scale);
    });
  }
  by_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    by_gates(p.mode, [&](auto gates) {
      constexpr int kGates = decltype(gates)::value;
      call.launch_sequence(backward_kernel<Element, kGates>, p, kGates > 1);
    });
    if (norm) launch(input_norm_kernel<Element>, call.row_blocks(p.rows), kRowThreads, 0, call.stream(), p);
  });

  // Products and sums over all rows of all steps at once.
  const auto sum_into = [&](Tensor& out, const Tensor& rows) {
    // In float32, and rounded once.
    const int64_t first = 0;
    const bool wide = rows.scalar_type() != out.scalar_type();
    Tensor sum = wide ? call.empty({out.size(0)}, rows.scalar_type()) : out;
    torch::stable::sum_out(sum, rows, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1), false, rows.scalar_type());
    if (wide) torch::stable::copy_(out, sum);
  };
  const auto weighted_into = [&](Tensor& out, const Tensor& rows, const Tensor& weights) {
    sum_into(out, call_op<Tensor>("aten::mul", "Tensor", rows, weights));
  };
  if (needed(0, input)) {
    const int64_t sizes[] = {p.rows, p.input_size};
    multiply_into(torch::stable::view(grad_input, {sizes, 2}), grad_ih, detached(w_ih));
  }
  if (needed(1, w_ih)) multiply_into(grad_w_ih, transposed(grad_ih), call.matrix(input));
  if (needed(2, w_hh)) {
    const Tensor fed = matrix_of(outputs, dtype);
    by_element(p.dtype, [&](auto element) {
      using Element = decltype(element);
      launch(fed_kernel<Element>, call.row_blocks(ceil_div(p.steps * p.batch * outputs, 32)), kRowThreads, 0,
             call.stream(), p, static_cast<Element*>(data_of(fed)));
    });
    multiply_into(grad_w_hh, transposed(grad_hh), fed);
  }
  if (needed(3, b_ih)) sum_into(grad_b_ih, norm ? *to_gates : grad_ih);
  if (needed(4, b_hh)) sum_into(grad_b_hh, norm ? *to_gates : grad_hh);
  if (needed(5, w_hr)) multiply_into(grad_w_hr, transposed(*grad_hidden), *hidden);
  if (norm) {
    Tensor saved = call.matrix(gates);
    const auto hats = [&](int64_t first) { return torch::stable::narrow(saved, 1, first * units, 4 * units); };
    if (needed(8, norm_ih)) weighted_into(grad_norm_ih, *to_gates, hats(4));
    if (needed(9, norm_hh)) weighted_into(grad_norm_hh, *to_gates, hats(8));
    if (needed(10, norm_c)) weighted_into(grad_norm_c, *behind_norm, *c_hat);
    if (needed(11, norm_c_bias)) sum_into(grad_norm_c_bias, *behind_norm);
  }
  return results;
}

}  // namespace
}  // namespace fastgen

FASTGEN_CUDA_OPS(m) {
  m.impl("recurrent", TORCH_BOX(&fastgen::recurrent));
  m.impl("recurrent_backward", TORCH_BOX(&fastgen::recurrent_backward));
}
