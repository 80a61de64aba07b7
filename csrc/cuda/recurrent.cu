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
//
// Layers of a stack run at once where their matrices fit on the chip together (Appleyard, Kocisky & Blunsom,
// "Optimizing performance of recurrent neural networks on GPUs", 2016): between two barriers each makes a step, the one
// behind the step that the layer below has just made. An upper layer multiplies the h of both with [W_hh | W_ih], for
// it cannot wait for one product of all steps.
//
// Double precision has a product of torch and a kernel for each step instead.
#include <algorithm>
#include <cmath>
#include <deque>
#include <tuple>
#include <vector>

#include "../torch/recurrent_ops.h"
#include "check.h"
#include "recurrent_backward.inl"
#include "recurrent_double.inl"
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
      : arguments_(arguments),
        like_(like),
        device_(like),
        stream_(current_stream(like)),
        multiprocessors_(multiprocessors()),
        shared_limit_(int64_t(shared_limit())) {}

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
    p.stages = 1;
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
  }
  template <class Params>
  void give_states(Sequence<Params>& p) {
    p.h = scratch(p.batch, p.output_size);
    if (p.mode == CellMode::kLstm) p.c = scratch(p.batch, p.hidden_size);
  }

  // The size of a product.
  Product product_of(int64_t units, int64_t width, int groups, int sides) const {
    Product out{};
    out.units = units;
    out.width = width;
    out.batch = arguments_.p.batch;
    out.sides = sides;
    out.groups = groups;
    out.chunks = int(ceil_div(width * element_size(), kChunk));
    out.tiles = int(ceil_div(units, kUnits));
    return out;
  }
  // Its operand, each side of which has `halves` halves, and its matrix from `source`, whose strides these are, and for
  // the second side from `below` likewise.
  void fill(Product& out, int halves, const void* source, const void* below, int64_t group_stride, int64_t unit_stride,
            int64_t stride) {
    const int64_t side = halves * out.batch * out.operand_pitch(), operand = out.sides * side,
                  matrix = out.tiles * out.tile_bytes();
    out.operand = static_cast<unsigned char*>(keep(torch::stable::new_zeros(like_, {&operand, 1}, ScalarType::Byte)));
    out.below = out.sides > 1 ? out.operand + side : nullptr;
    out.matrix = static_cast<unsigned char*>(keep(empty({matrix}, ScalarType::Byte)));
    by_element(arguments_.p.dtype, [&](auto element) {
      using Element = decltype(element);
      const PackParams<Element> p{static_cast<const Element*>(source),
                                  static_cast<const Element*>(below),
                                  group_stride,
                                  unit_stride,
                                  stride,
                                  out};
      launch(pack_kernel<Element>, unsigned(out.tiles * out.groups), kThreads, 0, stream_, p);
    });
  }
  Product product(int64_t units, int64_t width, int groups, int halves, const void* source, int64_t group_stride,
                  int64_t unit_stride, int64_t stride) {
    Product out = product_of(units, width, groups, 1);
    fill(out, halves, source, nullptr, group_stride, unit_stride, stride);
    return out;
  }

  // clusters: where there are any, blocks share what the product with the recurrent matrix reads.
  template <class Params>
  void launch_sequence(void (*kernel)(Params), Params& p, bool clusters) {
    deal(&p, 1, multiprocessors_, 1);
    const bool many = p.recurrent.tiles >= kCluster && p.recurrent.part_chunks() <= kWarps * kStages;
    const int room =
        clusters && many ? clusters_at_once(kernel, kCluster, kThreads, size_t(shared_limit_)) * kCluster : 0;
    if (room > 0) {
      Params other = p;
      other.recurrent.clusters = true;
      deal(&other, 1, room, kCluster);
      if (other.recurrent.shared >= 0 && cycles(&other, 1) <= cycles(&p, 1)) p = other;
    }
    p.arrived = counters(p.groups);
    const auto blocks = unsigned(p.unit_blocks * p.groups);
    const auto shared = size_t(p.shared.bytes);
    if (p.recurrent.clusters) {
      launch_clusters(kernel, blocks, kCluster, kThreads, shared, stream_, p);
    } else {
      launch_cooperative(kernel, blocks, kThreads, shared, stream_, p);
    }
  }

  // Layers that run at once, in stages as `beside` chose them.
  template <int kLayers>
  void launch_layers(void (*kernel)(Layers<kLayers>), Layers<kLayers>& p) {
    deal(p.layer, p.count, multiprocessors_, 1);
    const ForwardParams& any = p.layer[0];
    uint32_t* arrived = counters(any.groups);
    for (int l = 0; l < p.count; ++l) p.layer[l].arrived = arrived;
    launch_cooperative(kernel, unsigned(any.blocks_of_group() * any.groups), kThreads, size_t(any.shared.bytes),
                       stream_, p);
  }

  struct Beside {
    int count, stages;
  };
  // Of at most so many layers the number that takes the least time a layer and step when they run at once.
  Beside beside(int64_t most) const {
    const RecurrentParams& r = arguments_.p;
    Beside best{1, 1};
    int64_t least = 0;
    for (int count = 1; count <= std::min<int64_t>(most, kLayersMost); ++count) {
      for (int stages = 1; stages <= std::min(count, multiprocessors_); ++stages) {
        if (ceil_div(count, ceil_div(count, stages)) < stages) continue;  // the last stage would have none
        ForwardParams layers[kLayersMost]{};
        for (int l = 0; l < count; ++l) {
          layers[l].batch = r.batch;
          layers[l].stages = stages;
          layers[l].recurrent = product_of(r.hidden_size, r.hidden_size, gate_count(r.mode), l > 0 ? 2 : 1);
        }
        if (!deal(layers, count, multiprocessors_, 1) && count > 1) continue;
        const int64_t wave = kBarrier + ceil_div(count, stages) * kCells + cycles(layers, count);
        if (count == 1 || wave * best.count < least * count) {
          best = {count, stages};
          least = wave;
        }
      }
    }
    return best;
  }

  // In double precision, without the barriers of one kernel: a product of PyTorch and a kernel for each step.
  void run_in_double(DoubleForwardParams& p, const Tensor& state, const Tensor& w_hh, const Optional& w_hr) {
    const RecurrentParams& r = arguments_.p;
    const Tensor recurrent = transposed(detached(w_hh)), from_state = empty({r.batch, w_hh.size(0)});
    p.from_state = doubles(from_state);
    Tensor fed = state;
    if (r.h_mask != nullptr) {
      fed = empty({r.batch, r.output_size});
      p.fed = doubles(fed);
    }
    Optional projection, hidden, projected;
    if (w_hr) {
      projection = transposed(detached(*w_hr));
      hidden = empty({r.batch, r.hidden_size});
      projected = empty({r.batch, r.output_size});
      p.hidden = doubles(*hidden);
      p.projected = doubles(*projected);
    }
    const unsigned blocks = element_blocks();
    launch(double_begin_kernel, blocks, kRowThreads, 0, stream_, p);
    for (int64_t s = 0; s < r.steps; ++s) {
      const Step now = step_of(r, s);
      multiply_into(first_rows(from_state, now.rows), first_rows(fed, now.rows), recurrent);
      if (p.norm_ih != nullptr) {
        launch(double_norm_kernel, row_blocks(now.rows), kRowThreads, 0, stream_, p, now);
      } else {
        by_gates(r.mode, [&](auto gates) {
          launch(double_cell_kernel<decltype(gates)::value>, blocks, kRowThreads, 0, stream_, p, now);
        });
      }
      if (!w_hr) continue;
      multiply_into(first_rows(*projected, now.rows), first_rows(*hidden, now.rows), *projection);
      launch(double_emit_kernel, blocks, kRowThreads, 0, stream_, p, now);
    }
  }

  // Gives the gradients of h_0 and c_0 where those of state and cell stand.
  void run_in_double(DoubleBackwardParams& p, const Tensor& w_hh, const Optional& w_hr) {
    const RecurrentParams& r = arguments_.p;
    const bool norm = p.norm_ih != nullptr;
    const Tensor recurrent = detached(w_hh), returned = empty({r.batch, r.output_size}),
                 operand = empty({r.batch, w_hh.size(0)});
    p.returned = doubles(returned);
    p.operand = doubles(operand);
    Optional projection, behind, in_front;
    if (w_hr || norm) {
      behind = in_front = empty({r.batch, r.output_size});
      if (w_hr) {
        projection = detached(*w_hr);
        in_front = empty({r.batch, r.hidden_size});
      }
      p.behind = doubles(*behind);
      p.in_front = doubles(*in_front);
    }
    const unsigned blocks = element_blocks();
    launch(double_begin_backward_kernel, blocks, kRowThreads, 0, stream_, p);
    int64_t fed = 0;
    by_gates(r.mode, [&](auto gates) {
      constexpr int kGates = decltype(gates)::value;
      for (int64_t s = r.steps - 1; s >= 0; --s) {
        const Step now = step_of(r, s), before = s > 0 ? step_of(r, s - 1) : Step{};
        launch(double_state_kernel<kGates>, blocks, kRowThreads, 0, stream_, p, now, before, fed);
        if (w_hr) multiply_into(first_rows(*in_front, now.rows), first_rows(*behind, now.rows), *projection);
        if (norm) {
          launch(double_norm_gradients_kernel, row_blocks(now.rows), kRowThreads, 0, stream_, p, now, before);
        } else if (w_hr) {
          launch(double_hidden_kernel, blocks, kRowThreads, 0, stream_, p, now, before);
        }
        multiply_into(first_rows(returned, now.rows), first_rows(operand, now.rows), recurrent);
        fed = now.rows;
      }
      launch(double_state_kernel<kGates>, blocks, kRowThreads, 0, stream_, p, Step{}, Step{}, fed);
    });
  }

  unsigned row_blocks(int64_t warps) const {
    return unsigned(std::min<int64_t>(ceil_div(warps, kRowThreads / 32), 16 * multiprocessors_));
  }

 private:
  static double* doubles(const Tensor& tensor) { return static_cast<double*>(data_of(tensor)); }
  static Tensor first_rows(Tensor matrix, int64_t rows) {
    return rows == matrix.size(0) ? matrix : torch::stable::narrow(matrix, 0, 0, rows);
  }
  // For the units of all rows of a step.
  unsigned element_blocks() const {
    const RecurrentParams& r = arguments_.p;
    return row_blocks(ceil_div(r.batch * std::max(r.hidden_size, r.output_size), 32));
  }

  // What a step costs a block beside its products, in cycles: the barrier, and for each of its layers the first of the
  // operand on its way, the sums of the warps, and the cells.
  static constexpr int64_t kBarrier = 1800, kCells = 1200;

  uint32_t* counters(int groups) {
    const int64_t count = int64_t(groups) * kLine;
    return static_cast<uint32_t*>(keep(torch::stable::new_zeros(like_, {&count, 1}, ScalarType::Int)));
  }

  // Units over the multiprocessors that each stage has of `room`, in multiples of `unit` blocks, and rows of the batch
  // over what remains. Of a large batch a block reads less for all its steps where it has more units and fewer rows.
  // Returns whether all matrices stay on the chip.
  template <class Params>
  bool deal(Params* layers, int count, int room, int unit) const {
    const Params& any = *layers;
    const int blocks = room / any.stages, most = std::max(any.recurrent.tiles, any.projection.tiles);
    const auto take = [&](int tiles) {
      const int unit_blocks = int(ceil_div(ceil_div(most, tiles), unit)) * unit;
      for (Params* p = layers; p < layers + count; ++p) {
        p->unit_blocks = unit_blocks;
        p->groups = int(std::max<int64_t>(1, std::min<int64_t>(blocks / unit_blocks, ceil_div(p->batch, kRows))));
        p->recurrent.tiles_of_block = int(ceil_div(p->recurrent.tiles, unit_blocks));
        p->projection.tiles_of_block = int(ceil_div(p->projection.tiles, unit_blocks));
      }
      return arrange(layers, count);
    };
    int best = int(ceil_div(most, blocks));
    bool resident = take(best);
    int64_t least = cycles(layers, count);
    for (int tiles = best + 1; resident && tiles <= most; ++tiles) {
      resident = take(tiles);
      const int64_t found = cycles(layers, count);
      if (!resident || found >= least) continue;
      best = tiles;
      least = found;
    }
    return take(best);
  }

  // What the recurrent products of a step cost a block, about, in the stage where that is most: the matrix from shared
  // memory at 128 bytes a cycle, and the operand from L2, of which a multiprocessor has some 24 bytes a cycle where all
  // read.
  template <class Params>
  int64_t cycles(const Params* layers, int count) const {
    const int64_t of_stage = ceil_div(count, layers->stages);
    int64_t most = 0, stage = 0;
    for (int l = 0; l < count; ++l) {
      const Product& of = layers[l].recurrent;
      const int64_t row_tiles = ceil_div(ceil_div(layers[l].batch, kRows), layers[l].groups);
      const int64_t operand = of.sides * kRows * of.operand_pitch() / (of.clusters ? kCluster : 1);
      const int64_t reads = of.stays(layers[l].shared) ? 1 : of.tiles_of_block;
      stage = (l % of_stage == 0 ? 0 : stage) + row_tiles * (of.resident_bytes() / 128 + reads * operand / 24);
      most = std::max(most, stage);
    }
    return most;
  }

  // Which matrices stay on the chip, and where everything stands there. Returns whether all do; of one layer one of
  // them may.
  template <class Params>
  bool arrange(Params* layers, int count) const {
    const int64_t of_stage = ceil_div(count, layers->stages);
    const int64_t sums = int64_t(sizeof(float)) * kWarps * kGroupsMost * kUnits * kSumPitch;
    SharedPlan plan{kWarps, 0, kStageOperand, 0, 0};
    const auto fits = [&](int64_t matrices) {
      plan.rings = int(matrices);
      plan.sums = plan.rings + plan.warps * kStages * plan.stage;
      plan.bytes = plan.sums + int(sums);
      return plan.bytes <= shared_limit_;
    };
    int64_t matrices = 0, stage = 0;
    for (int l = 0; l < count; ++l) {
      if (l % of_stage == 0) stage = 0;
      for (Product* of : {&layers[l].recurrent, &layers[l].projection}) {
        of->shared = of->tiles > 0 ? int(stage) : -1;
        stage += of->resident_bytes();
      }
      matrices = std::max(matrices, stage);
    }
    const bool all = fits(matrices);
    if (!all) {
      plan.warps = kWarpsStreamed;
      plan.stage = kStageStreamed;
      Product* kept = nullptr;
      for (Product* of : {&layers->recurrent, &layers->projection}) {
        of->shared = -1;
        if (kept == nullptr && of->tiles > 0 && fits(of->resident_bytes())) kept = of;
      }
      if (kept != nullptr) {
        kept->shared = 0;
      } else {
        fits(0);
      }
    }
    for (int l = 0; l < count; ++l) layers[l].shared = plan;
    return all;
  }

  RecurrentArguments& arguments_;
  const Tensor& like_;
  OnDevice device_;
  cudaStream_t stream_;
  int multiprocessors_;
  int64_t shared_limit_;  // of a block, in bytes
  std::vector<Tensor> kept_;
};

// Whether the kernels of all steps take a call. Of single layers those of a step take double precision.
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
      save && lstm ? call.empty(arguments.rows_of(units + saved_scales(p)), arguments.work_dtype()) : call.empty({0});
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
  if (!takes(input)) {
    if (norm) {
      launch(standardise_kernel<double>, call.row_blocks(p.rows), kRowThreads, 0, call.stream(), p,
             static_cast<double*>(data_of(from_input)));
    }
    DoubleForwardParams wide{};
    static_cast<Sequence<RecurrentParams>&>(wide) = p;
    wide.from_input = static_cast<const double*>(p.from_input);
    call.run_in_double(wide, h_n, w_hh, w_hr);
    return {output, h_n, c_n, gates, cells};
  }
  call.give_states(p);
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
    by_gates(p.mode, [&](auto gates) {
      Layers<1> alone{{p}, 1};
      call.launch_layers(forward_kernel<Element, decltype(gates)::value, 1>, alone);
    });
  });
  return {output, h_n, c_n, gates, cells};
}

using LayersResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LayersResults recurrent_layers(int64_t mode, const Tensor& input, const Optional& batch_sizes,
                               const std::vector<Tensor>& weights, const Tensor& h_0, const Optional& c_0,
                               const Optional& h_mask, bool batch_first, bool save, const Optional& seed_offset,
                               double dropout) {
  if (!takes(input)) {
    return plain<LayersResults>("fastgen::recurrent_layers", mode, input, batch_sizes, weights, h_0, c_0, h_mask,
                                batch_first, save, seed_offset, dropout);
  }
  const int64_t layers = h_0.dim() == 3 ? h_0.size(0) : 0;
  STD_TORCH_CHECK(layers > 0, "h_0: expected 3 dimensions, the first of at least one layer");
  const int64_t each = int64_t(weights.size()) / layers;
  STD_TORCH_CHECK(int64_t(weights.size()) == layers * each && (each == 2 || each == 4),
                  "weights: expected 2 or 4 tensors for each of ", layers, " layers, got ", weights.size());
  STD_TORCH_CHECK(dropout >= 0 && dropout <= 1 && (dropout > 0) == seed_offset.has_value(),
                  "dropout: expected a probability, above 0 with a seed_offset and 0 without, got ", dropout);
  const auto at = [](const Tensor& of, int64_t layer) { return torch::stable::select(of, 0, layer); };
  const auto given = [&](const Optional& of, int64_t layer) {
    STD_TORCH_CHECK(!of || (of->dim() == 3 && of->size(0) == layers), "c_0, h_mask: expected ", layers, " layers");
    return of ? Optional(at(*of, layer)) : Optional();
  };
  std::deque<RecurrentArguments> arguments;
  const auto check = [&](int64_t layer, const Tensor& x) {
    const Tensor* of = &weights[size_t(layer * each)];
    const Optional b_ih = each == 4 ? Optional(of[2]) : Optional(), b_hh = each == 4 ? Optional(of[3]) : Optional();
    arguments.emplace_back(mode, x, batch_sizes, of[0], of[1], b_ih, b_hh, Optional(), at(h_0, layer),
                           given(c_0, layer), given(h_mask, layer), batch_first, false);
  };
  check(0, input);
  const RecurrentParams& r = arguments[0].p;
  const bool lstm = r.mode == CellMode::kLstm, gated = saved_gates(r) > 0;
  const int64_t units = r.hidden_size;
  const ScalarType dtype = input.scalar_type();
  const auto empty = [&](const std::vector<int64_t>& sizes, ScalarType type) {
    return torch::stable::new_empty(input, {sizes.data(), sizes.size()}, type);
  };
  const auto stacked = [&](bool wanted, int64_t count, int64_t width, ScalarType type) {
    if (!wanted) return empty({0}, dtype);
    std::vector<int64_t> sizes = arguments[0].rows_of(width);
    sizes.insert(sizes.begin(), count);
    return empty(sizes, type);
  };
  const Tensor output = empty(arguments[0].rows_of(units), dtype), h_n = empty({layers, r.batch, units}, dtype),
               c_n = lstm ? empty({layers, r.batch, units}, dtype) : empty({0}, dtype),
               below = stacked(true, layers - 1, units, dtype), passed = stacked(dropout > 0, layers - 1, units, dtype),
               gates = stacked(save && gated, layers, saved_gates(r) * units, dtype),
               cells = stacked(save && lstm, layers, units, ScalarType::Float);
  const auto input_of = [&](int64_t layer) { return layer == 0 ? input : at(dropout > 0 ? passed : below, layer - 1); };
  for (int64_t layer = 1; layer < layers; ++layer) check(layer, input_of(layer));
  const LayersResults results{output, h_n,  c_n, save ? below : empty({0}, dtype), save ? passed : empty({0}, dtype),
                              gates,  cells};
  if (r.batch == 0) return results;

  const int64_t* seeds = nullptr;
  if (dropout > 0) {
    check_seed_offset(*seed_offset, 2);
    STD_TORCH_CHECK(seed_offset->dim() == 2 && seed_offset->size(0) == layers - 1 && same_device(*seed_offset, input),
                    "seed_offset: expected a row for each layer but the last, on the device of input");
    seeds = static_cast<const int64_t*>(arguments[0].contiguous(seed_offset));
  }
  for (int64_t first = 0; first < layers;) {
    Sequencer call(arguments[size_t(first)], input);
    const auto [count, stages] = call.beside(layers - first);
    Layers<kLayersMost> p{};
    p.count = count;
    for (int i = count - 1; i >= 0; --i) {  // from above, where each finds what it writes to
      const int64_t layer = first + i;
      const bool last = layer + 1 == layers;
      ForwardParams& of = p.layer[i];
      static_cast<RecurrentParams&>(of) = arguments[size_t(layer)].p;
      of.output = data_of(last ? output : at(below, layer));
      of.h_n = data_of(at(h_n, layer));
      of.c_n = lstm ? data_of(at(c_n, layer)) : nullptr;
      of.gates = save && gated ? data_of(at(gates, layer)) : nullptr;
      of.cells = save && lstm ? data_of(at(cells, layer)) : nullptr;
      of.recurrent = call.product_of(units, units, gate_count(of.mode), i > 0 ? 2 : 1);
      call.fill(of.recurrent, 2, of.w_hh, of.w_ih, units * units, units, 1);
      if (i + 1 < count) of.above = p.layer[i + 1].recurrent.below;
      if (dropout == 0 || last) continue;
      of.passed = data_of(at(passed, layer));
      of.kept = Zone{true, 0.0f, uint64_t(std::nearbyint((1 - dropout) * 0x1p32)), 0};
      of.drop_seed = seeds + 2 * layer;
      of.kept_scale = dropout < 1 ? float(1 / (1 - dropout)) : 0.0f;
    }
    const Tensor from_input = call.empty({r.rows, weights[0].size(0)});
    multiply_into(from_input, call.matrix(input_of(first)), transposed(detached(weights[size_t(first * each)])));
    p.layer[0].from_input = data_of(from_input);
    call.prepare(p.layer[0], Optional());
    for (int i = 0; i < count; ++i) {
      p.layer[i].stages = stages;
      p.layer[i].batch_sizes = p.layer[0].batch_sizes;
      p.layer[i].step_rows = p.layer[0].step_rows;
      call.give_states(p.layer[i]);
    }
    by_element(r.dtype, [&](auto element) {
      using Element = decltype(element);
      by_gates(r.mode, [&](auto gates) {
        call.launch_layers(forward_kernel<Element, decltype(gates)::value, kLayersMost>, p);
      });
    });
    first += count;
  }
  return results;
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
  if (lstm) arguments.check_rows("cells", cells, input, units + saved_scales(p), arguments.work_dtype());
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
  if (norm) {
    c_hat = matrix_of(units, arguments.work_dtype());
    to_gates = matrix_of(columns, arguments.work_dtype());
    behind_norm = matrix_of(units, arguments.work_dtype());
  }
  call.prepare(p, seed_offset);
  if (takes(input)) {
    call.give_states(p);
    p.recurrent = call.product(outputs, columns, 1, 2, p.w_hh, 0, 1, outputs);
    if (w_hr) p.projection = call.product(units, outputs, 1, 1, p.w_hr, 0, 1, units);
    if (norm) {
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
      if (norm)
        launch(input_norm_kernel<Element, BackwardParams>, call.row_blocks(p.rows), kRowThreads, 0, call.stream(), p);
    });
  } else {
    DoubleBackwardParams wide{};
    static_cast<Sequence<RecurrentBackwardParams>&>(wide) = p;
    wide.state = static_cast<double*>(p.grad_h_0 != nullptr ? p.grad_h_0 : call.keep(call.empty({p.batch, outputs})));
    wide.cell = static_cast<double*>(p.grad_c_0 != nullptr ? p.grad_c_0 : call.keep(call.empty({p.batch, units})));
    wide.grad_gates_ih = static_cast<double*>(p.grad_gates_ih);
    wide.grad_gates_hh = static_cast<double*>(p.grad_gates_hh);
    if (norm) {
      wide.c_hat = static_cast<double*>(data_of(*c_hat));
      wide.to_gates = static_cast<double*>(data_of(*to_gates));
      wide.behind_norm = static_cast<double*>(data_of(*behind_norm));
    }
    call.run_in_double(wide, w_hh, w_hr);
    if (norm) {
      launch(input_norm_kernel<double, DoubleBackwardParams>, call.row_blocks(p.rows), kRowThreads, 0, call.stream(),
             wide);
    }
  }

  // Products and sums over all rows of all steps at once.
  const auto sum_into = [&](Tensor& out, const Tensor& rows) {
    // Of half types in float32, and rounded once.
    const bool wide = rows.scalar_type() != out.scalar_type();
    Tensor sum = wide ? call.empty({out.size(0)}, rows.scalar_type()) : out;
    sum_rows_into(sum, rows);
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
    const auto gather = [&](auto element) {
      using Element = decltype(element);
      launch(fed_kernel<Element>, call.row_blocks(ceil_div(p.steps * p.batch * outputs, 32)), kRowThreads, 0,
             call.stream(), p, static_cast<Element*>(data_of(fed)));
    };
    takes(input) ? by_element(p.dtype, gather) : gather(double{});
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
  m.impl("recurrent_layers", TORCH_BOX(&fastgen::recurrent_layers));
  m.impl("recurrent_backward", TORCH_BOX(&fastgen::recurrent_backward));
}
