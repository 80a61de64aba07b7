// The kernel tables of csrc/cpu under the sanitizers, without torch: every kernel, instruction set and dtype
// on heap buffers of exactly the size that the parameters name, so that a read or write one element out of
// place stops the program. Every result must have the bits of the generic kernels run in one piece; sums of
// products, those of the same kernels run in one piece.
// Usage: kernels_test [isa ...]; prints the number of comparisons.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/isa.h"

using namespace fastgen;

namespace {

long comparisons = 0;

// A block that starts where malloc puts it and ends with its last byte. Filled with a pattern, so that
// what a kernel forgot to write differs from what another wrote.
struct Buffer {
  explicit Buffer(size_t bytes, int fill = 0xAB) : size(bytes), data(static_cast<char*>(malloc(bytes))) {
    memset(data, fill, bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data); }
  size_t size;
  char* data;
};

void expect_same(const Buffer& a, const Buffer& b, const std::string& what) {
  ++comparisons;
  if (a.size == b.size && memcmp(a.data, b.data, a.size) == 0) return;
  size_t at = 0;
  while (at < a.size && a.data[at] == b.data[at]) ++at;
  fprintf(stderr, "%s: differs at byte %zu of %zu\n", what.c_str(), at, a.size);
  exit(1);
}

size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kBool: return 1;
  }
  abort();
}

const KernelTable& table(const char* isa) {
  if (!select_isa(isa)) {
    fprintf(stderr, "%s: not usable here\n", isa);
    exit(2);
  }
  return kernels();
}

void test_random(const char* isa) {
  struct Case {
    Distribution distribution;
    std::vector<DType> dtypes;
    double a, b, c;
  };
  const std::vector<DType> reals = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  const Case cases[] = {
      {Distribution::kBits, {DType::kInt32, DType::kInt64}, 0, 0, 0},
      {Distribution::kUniform, reals, 0, 1, 1},
      {Distribution::kUniform, reals, -3, 5, 1.75},
      {Distribution::kNormal, reals, 0, 1, 0},
      {Distribution::kNormal, reals, -2, 0.5, 0},
      {Distribution::kExponential, reals, 3, 0, 0},
      {Distribution::kBernoulli,
       {DType::kBool, DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16},
       1.5e9,
       0,
       0},
  };
  const uint64_t offsets[] = {0, 1, 2, 3, (1ull << 34) - 5, ~0ull - 20};
  std::vector<int64_t> counts = {1023, 1025, 2 * kPiece + 3};
  for (int64_t n = 0; n <= 67; ++n) counts.push_back(n);
  for (const Case& c : cases) {
    for (const DType dtype : c.dtypes) {
      for (const uint64_t offset : offsets) {
        for (const int64_t count : counts) {
          if (count > 9 && offset > 1 && count != 40) continue;
          RandomParams p{c.distribution, dtype, 0x123456789abcdefull, offset, c.a, c.b, c.c, nullptr, count};
          Buffer want(size_t(count) * size_of(dtype)), got(want.size, 0xCD);
          p.out = want.data;
          table("generic").random(p, 0, count);
          p.out = got.data;
          const KernelTable& kernels = table(isa);
          const int64_t middle = count * 2 / 5;  // two threads
          kernels.random(p, middle, count);
          kernels.random(p, 0, middle);
          expect_same(want, got,
                      std::string(isa) + " random " + std::to_string(int(c.distribution)) + " dtype " +
                          std::to_string(int(dtype)) + " offset " + std::to_string(offset) + " count " +
                          std::to_string(count));
        }
      }
    }
  }
}

// Numbers between -3 and 3, times scale.
void fill(Buffer& buffer, DType dtype, int seed, double scale) {
  for (size_t i = 0; i < buffer.size / size_of(dtype); ++i) {
    const double x = scale * double(int((i * 37 + size_t(seed) * 11) % 101) - 50) / 16;
    char* at = buffer.data + i * size_of(dtype);
    if (dtype == DType::kFloat64) {
      memcpy(at, &x, 8);
    } else if (dtype == DType::kFloat32) {
      const float y = float(x);
      memcpy(at, &y, 4);
    } else if (dtype == DType::kBFloat16) {
      BFloat16 y;
      narrow(float(x), &y);
      memcpy(at, &y, 2);
    } else {
      Float16 y;
      narrow(float(x), &y);
      memcpy(at, &y, 2);
    }
  }
}

// A tensor of `rows` (as extents) by `inner`, with the given strides in elements, in a buffer that ends with
// its last element.
struct Tensor {
  Tensor(DType dtype, const Shape& shape, const std::vector<int64_t>& outer_stride, int64_t inner_stride, int seed)
      : buffer(elements(shape, outer_stride, inner_stride) * size_of(dtype)) {
    fill(buffer, dtype, seed, 1);
    operand.data = buffer.data;
    for (int d = 0; d < shape.outer_dims; ++d) operand.outer_stride[d] = outer_stride[size_t(d)];
    operand.inner_stride = inner_stride;
  }
  static size_t elements(const Shape& shape, const std::vector<int64_t>& outer_stride, int64_t inner_stride) {
    int64_t last = (shape.inner - 1) * inner_stride;
    for (int d = 0; d < shape.outer_dims; ++d) last += (shape.outer[d] - 1) * outer_stride[size_t(d)];
    return size_t(last + 1);
  }
  Buffer buffer;
  Operand operand{};
};

struct Layout {
  std::vector<int64_t> outer_stride;
  int64_t inner_stride;
};

// Contiguous, every second element, transposed, broadcast along the row, broadcast down the column.
std::vector<Layout> layouts(const std::vector<int64_t>& outer, int64_t inner) {
  std::vector<int64_t> dense(outer.size()), columns(outer.size()), none(outer.size(), 0);
  int64_t step = inner, column_step = 1;
  for (size_t d = outer.size(); d-- > 0; step *= outer[d]) dense[d] = step;
  for (size_t d = outer.size(); d-- > 0; column_step *= outer[d]) columns[d] = column_step;
  std::vector<int64_t> doubled = dense;
  for (int64_t& s : doubled) s *= 2;
  return {{dense, 1}, {doubled, 2}, {columns, column_step}, {columns, 0}, {none, 1}, {none, 0}};
}

void test_reparameterize(const char* isa) {
  std::vector<std::pair<std::vector<int64_t>, int64_t>> shapes = {
      {{}, 1}, {{7}, 1}, {{2, 3}, 5}, {{3}, kPiece}, {{2}, kPiece + 1}, {{2}, 2 * kPiece + 9}};
  for (const int64_t n : {2, 3, 4, 6, 7, 8, 9, 15, 16, 17, 20, 31, 33}) shapes.push_back({{3}, n});
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  for (const auto& [outer, inner] : shapes) {
    Shape shape{};
    shape.outer_dims = int(outer.size());
    shape.rows = 1;
    for (size_t d = 0; d < outer.size(); ++d) shape.rows *= shape.outer[d] = outer[d];
    shape.inner = inner;
    const std::vector<Layout> all = layouts(outer, inner);
    const int64_t pieces = shape.rows * pieces_per_row(shape);
    for (const DType dtype : dtypes) {
      for (size_t i = 0; i < all.size(); ++i) {
        const Layout &first = all[i], &second = all[(i + 2) % all.size()], &third = all[(i + 3) % all.size()];
        const Tensor mu(dtype, shape, first.outer_stride, first.inner_stride, 1);
        const Tensor logvar(dtype, shape, second.outer_stride, second.inner_stride, 2);
        const Tensor eps(dtype, shape, third.outer_stride, third.inner_stride, 3);
        const Tensor grad_z(dtype, shape, third.outer_stride, third.inner_stride, 4);
        const Tensor grad_kl(dtype, shape, second.outer_stride, 0, 5);
        const size_t bytes = size_t(shape.rows * inner) * size_of(dtype);
        const size_t row_bytes = size_t(shape.rows) * size_of(dtype);
        const std::string what = std::string(isa) + " reparameterize dtype " + std::to_string(int(dtype)) + " inner " +
                                 std::to_string(inner) + " layout " + std::to_string(i);
        for (int mode = 0; mode < 4; ++mode) {  // noise drawn or given, with the divergence or without
          const bool given = mode & 1, with_kl = mode & 2;
          ReparameterizeParams p{};
          p.dtype = dtype;
          p.shape = shape;
          p.seed = 99;
          p.offset = ~0ull - 7;
          p.mu = mu.operand;
          p.logvar = logvar.operand;
          if (given) p.eps = eps.operand;
          Buffer z[2] = {Buffer(bytes), Buffer(bytes, 0xCD)}, kl[2] = {Buffer(row_bytes), Buffer(row_bytes, 0xCD)};
          for (int run = 0; run < 2; ++run) {
            const KernelTable& kernels = table(run == 0 ? "generic" : isa);
            Buffer parts(size_t(pieces) * sizeof(double));
            p.z = z[run].data;
            p.kl = with_kl ? kl[run].data : nullptr;
            p.kl_pieces = with_kl && pieces_per_row(shape) > 1 ? reinterpret_cast<double*>(parts.data) : nullptr;
            const int64_t middle = run == 0 ? 0 : pieces / 3;
            kernels.reparameterize(p, middle, pieces);
            kernels.reparameterize(p, 0, middle);
            if (p.kl_pieces != nullptr) kernels.reparameterize_add_pieces(p, 0, shape.rows);
          }
          expect_same(z[0], z[1], what + " z");
          if (with_kl) expect_same(kl[0], kl[1], what + " kl");
        }
        for (int mode = 0; mode < 6; ++mode) {  // grad_z, grad_kl or both, noise drawn or given
          const bool given = mode & 1, with_z = mode / 2 != 1, with_kl = mode / 2 != 0;
          ReparameterizeBackwardParams p{};
          p.dtype = dtype;
          p.shape = shape;
          p.seed = 99;
          p.offset = ~0ull - 7;
          p.logvar = logvar.operand;
          if (with_kl) p.mu = mu.operand;
          if (given) p.eps = eps.operand;
          if (with_z) p.grad_z = grad_z.operand;
          if (with_kl) p.grad_kl = grad_kl.operand;
          Buffer to_mu[2] = {Buffer(bytes), Buffer(bytes, 0xCD)}, to_v[2] = {Buffer(bytes), Buffer(bytes, 0xCD)};
          for (int run = 0; run < 2; ++run) {
            const KernelTable& kernels = table(run == 0 ? "generic" : isa);
            p.grad_mu = with_kl ? to_mu[run].data : nullptr;
            p.grad_logvar = to_v[run].data;
            const int64_t middle = run == 0 ? 0 : pieces / 3;
            kernels.reparameterize_backward(p, middle, pieces);
            kernels.reparameterize_backward(p, 0, middle);
          }
          if (with_kl) expect_same(to_mu[0], to_mu[1], what + " grad_mu");
          expect_same(to_v[0], to_v[1], what + " grad_logvar");
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// The recurrent family. Its bits differ between instruction sets, but not between splits of the work.

// One call in both directions, on operands of exactly their size.
struct Recurrent {
  RecurrentBackwardParams p{};
  std::vector<int64_t> sizes, firsts;
  std::vector<std::unique_ptr<Buffer>> operands, results;
  DType work;

  Recurrent(CellMode mode, DType dtype, int64_t steps, int64_t batch, int64_t inputs, int64_t hidden, int64_t outputs,
            int variant)
      : work(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32) {
    const bool projected = outputs > 0, packed = variant & 1, batch_first = variant & 2, masked = variant & 8;
    p.mode = mode;
    p.dtype = dtype;
    p.reverse = variant & 4;
    p.steps = steps;
    p.batch = batch;
    p.input_size = inputs;
    p.hidden_size = hidden;
    p.output_size = projected ? outputs : hidden;
    p.rows = steps * batch;
    p.row_step = batch_first ? 1 : batch;
    p.row_batch = batch_first ? steps : 1;
    if (packed) {
      p.rows = 0;
      for (int64_t t = 0; t < steps; ++t) {
        sizes.push_back(batch - t < 1 ? 1 : batch - t);
        firsts.push_back(p.rows);
        p.rows += sizes.back();
      }
      p.batch_sizes = sizes.data();
      p.step_rows = firsts.data();
      p.row_batch = 1;
    }
    const int64_t gates = gate_count(mode) * hidden, states = p.output_size;
    const bool lstm = mode == CellMode::kLstm;
    p.input = operand(p.rows * inputs, 1, 1);
    p.input_step = p.row_step * inputs;
    p.input_batch = p.row_batch * inputs;
    p.w_ih = operand(gates * inputs, 2, 0.1);
    p.w_hh = operand(gates * states, 3, 0.1);
    p.b_ih = variant & 16 ? operand(gates, 4, 0.1) : nullptr;
    p.b_hh = variant & 16 ? operand(gates, 5, 0.1) : nullptr;
    p.w_hr = projected ? operand(states * hidden, 6, 0.1) : nullptr;
    p.h_0 = operand(batch * states, 7, 0.3);
    p.c_0 = lstm ? operand(batch * hidden, 8, 0.3) : nullptr;
    p.h_mask = masked ? operand(batch * states, 9, 0.5) : nullptr;
    if (lstm && variant & 32) {
      p.norm_ih = operand(gates, 13, 1);
      p.norm_hh = operand(gates, 14, 1);
      p.norm_c = operand(hidden, 15, 1);
      p.norm_c_bias = operand(hidden, 16, 0.1);
      p.norm_eps = 1e-5;
    }
    if (variant & 64) {
      p.zoneout_c = lstm ? 0.5 : 0;
      p.zoneout_h = 0.25;
      p.zoneout_drawn = variant & 2;
      p.seed = 99;
      p.offset = ~0ull - 7;
    }
    p.grad_output = operand(p.rows * states, 10, 0.1);
    p.grad_step = p.row_step * states;
    p.grad_batch = p.row_batch * states;
    p.grad_h_n = operand(batch * states, 11, 0.1);
    p.grad_c_n = lstm ? operand(batch * hidden, 12, 0.1) : nullptr;
  }

  const void* operand(int64_t count, int seed, double scale) {
    operands.push_back(std::make_unique<Buffer>(size_t(count) * size_of(p.dtype)));
    fill(*operands.back(), p.dtype, seed, scale);
    return operands.back()->data;
  }
  void* result(int64_t count, DType dtype) {
    results.push_back(std::make_unique<Buffer>(size_t(count) * size_of(dtype), int(results.size())));
    return results.back()->data;
  }

  // parts: of the rows of the batch, each through all steps; 0: all rows together, the steps in two parts of units.
  void run(const KernelTable& table, int64_t parts) {
    results.clear();
    const int64_t gates = gate_count(p.mode) * p.hidden_size, slack = 64;
    const bool lstm = p.mode == CellMode::kLstm;
    p.output = result(p.rows * p.output_size, p.dtype);
    p.h_n = result(p.batch * p.output_size, p.dtype);
    p.c_n = lstm ? result(p.batch * p.hidden_size, p.dtype) : nullptr;
    p.gates = saved_gates(p) > 0 ? result(p.rows * saved_gates(p) * p.hidden_size, p.dtype) : nullptr;
    p.cells = lstm ? result(p.rows * (p.hidden_size + saved_scales(p)), work) : nullptr;
    forward(table, parts);
    p.grad_input = result(p.rows * p.input_size, p.dtype);
    p.grad_w_ih = result(gates * p.input_size, work);
    p.grad_w_hh = result(gates * p.output_size, work);
    p.grad_b_ih = p.b_ih != nullptr ? result(gates, work) : nullptr;
    p.grad_b_hh = p.b_hh != nullptr ? result(gates, work) : nullptr;
    p.grad_w_hr = p.w_hr != nullptr ? result(p.output_size * p.hidden_size, work) : nullptr;
    p.grad_h_0 = result(p.batch * p.output_size, p.dtype);
    p.grad_c_0 = lstm ? result(p.batch * p.hidden_size, p.dtype) : nullptr;
    const bool norm = p.norm_ih != nullptr;
    p.grad_norm_ih = norm ? result(gates, work) : nullptr;
    p.grad_norm_hh = norm ? result(gates, work) : nullptr;
    p.grad_norm_c = norm ? result(p.hidden_size, work) : nullptr;
    p.grad_norm_c_bias = norm ? result(p.hidden_size, work) : nullptr;
    Buffer grad_gates(size_t(p.rows * gate_gradients(p) * p.hidden_size) * size_of(p.dtype) + slack);
    Buffer hidden(size_t(p.rows * p.hidden_size) * size_of(p.dtype));
    Buffer grad_hidden(size_t(p.rows * p.output_size) * size_of(p.dtype) + slack);
    std::vector<const void*> pointers(size_t(3 * p.rows));
    p.grad_gates = grad_gates.data;
    p.hidden = p.w_hr != nullptr ? hidden.data : nullptr;
    p.grad_hidden = p.w_hr != nullptr ? grad_hidden.data : nullptr;
    p.input_rows = pointers.data();
    p.state_rows = p.input_rows + p.rows;
    p.mask_rows = p.state_rows + p.rows;
    backward(table, parts);
  }

  // body(begin, end) over [0, count) in one or two parts.
  template <class Body>
  static void halves(int64_t count, int64_t parts, const Body& body) {
    const int64_t middle = parts == 1 ? 0 : count / 2;
    body(middle, count);
    if (middle > 0) body(0, middle);
  }

  void forward(const KernelTable& table, int64_t parts) {
    using Phase = RecurrentPhase;
    const RecurrentSizes of = table.recurrent_sizes(p, p.batch);
    Buffer packed{size_t(of.packed)};
    p.packed = packed.data;
    RecurrentWork work{};
    const auto blocks = [&](Phase phase, int64_t count) {
      halves(count, parts, [&](int64_t begin, int64_t end) {
        work.phase = phase;
        work.first_block = begin;
        work.end_block = end;
        table.recurrent(p, work);
      });
    };
    blocks(Phase::kPack, of.blocks + of.projection_blocks);
    if (parts > 0) {
      halves(p.batch, parts, [&](int64_t begin, int64_t end) {
        Buffer scratch(size_t(table.recurrent_sizes(p, end - begin).scratch));
        table.recurrent(p, {Phase::kRows, begin, end, 0, 0, 0, 0, scratch.data});
      });
      return;
    }
    Buffer scratch(size_t(of.scratch));
    work.end_row = p.batch;
    work.scratch = scratch.data;
    blocks(Phase::kStart, 1);
    for (int64_t s = 0; s < p.steps; s += of.chunk) {
      work.first_step = s;
      work.end_step = s + of.chunk < p.steps ? s + of.chunk : p.steps;
      blocks(Phase::kGather, 1);
      blocks(Phase::kInput, of.blocks);
      for (; work.first_step < work.end_step; ++work.first_step) {
        blocks(Phase::kStep, of.blocks);
        if (by_rows(p)) blocks(Phase::kCells, p.batch);
        if (of.projection_blocks > 0) blocks(Phase::kProject, of.projection_blocks);
        if (by_rows(p) && of.projection_blocks > 0) blocks(Phase::kEmit, p.batch);
      }
    }
    blocks(Phase::kFinish, 1);
  }

  void backward(const KernelTable& table, int64_t parts) {
    using Phase = RecurrentBackwardPhase;
    const RecurrentBackwardSizes of = table.recurrent_backward_sizes(p, p.batch);
    Buffer packed{size_t(of.packed)};
    p.packed = packed.data;
    RecurrentBackwardWork work{};
    const auto blocks = [&](Phase phase, int64_t count) {
      halves(count, parts, [&](int64_t begin, int64_t end) {
        work.phase = phase;
        work.first_block = begin;
        work.end_block = end;
        table.recurrent_backward(p, work);
      });
    };
    blocks(Phase::kPack, of.panels);
    if (parts > 0) {
      halves(p.batch, parts, [&](int64_t begin, int64_t end) {
        Buffer scratch(size_t(table.recurrent_backward_sizes(p, end - begin).scratch));
        table.recurrent_backward(p, {Phase::kRows, begin, end, 0, 0, 0, 0, scratch.data});
      });
    } else {
      Buffer scratch(size_t(of.scratch));
      work.end_row = p.batch;
      work.scratch = scratch.data;
      blocks(Phase::kStart, 1);
      for (work.first_step = p.steps - 1; work.first_step >= 0; --work.first_step) {
        if (by_rows(p) || p.w_hr != nullptr) blocks(Phase::kReturn, of.blocks);
        if (by_rows(p) && p.w_hr != nullptr) blocks(Phase::kEmit, p.batch);
        if (p.w_hr != nullptr) {
          blocks(Phase::kStep, of.projection_blocks);
        } else if (!by_rows(p)) {
          blocks(Phase::kStep, of.blocks);
        }
        if (by_rows(p)) blocks(Phase::kCells, p.batch);
      }
      blocks(Phase::kReturn, of.blocks);
      blocks(Phase::kFinish, 1);
    }
    halves(p.rows, parts, [&](int64_t begin, int64_t end) {
      Buffer scratch(size_t(of.input_scratch));
      table.recurrent_backward(p, {Phase::kInput, begin, end, 0, 0, 0, 0, scratch.data});
    });
    table.recurrent_backward(p, {Phase::kPoint, 0, 0, 0, p.steps, 0, 0, nullptr});
    halves(gate_count(p.mode) * p.hidden_size + (p.w_hr != nullptr ? p.output_size : 0), parts,
           [&](int64_t begin, int64_t end) {
             Buffer scratch(size_t(of.weight_scratch));
             table.recurrent_backward(p, {Phase::kWeights, 0, 0, 0, 0, begin, end, scratch.data});
           });
  }
};

void test_recurrent(const char* isa) {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  int variant = 0;
  for (int mode = 0; mode < 4; ++mode) {
    for (const DType dtype : dtypes) {
      for (const int64_t hidden : {1, 17, 40}) {
        for (const int64_t outputs : {0, 5}) {
          if (outputs > 0 && mode != 0) continue;
          variant += 7;  // coprime to 128: all options meet
          const int64_t inputs = variant % 3 == 0 ? 16 : 3, batch = 1 + variant % 9;
          Recurrent whole(CellMode(mode), dtype, 4, batch, inputs, hidden, outputs, variant);
          Recurrent other(CellMode(mode), dtype, 4, batch, inputs, hidden, outputs, variant);
          whole.run(table(isa), 1);
          for (const int64_t parts : {2, 0}) {
            other.run(table(isa), parts);
            for (size_t i = 0; i < whole.results.size(); ++i) {
              expect_same(*whole.results[i], *other.results[i],
                          std::string(isa) + " recurrent mode " + std::to_string(mode) + " dtype " +
                              std::to_string(int(dtype)) + " hidden " + std::to_string(hidden) + " variant " +
                              std::to_string(variant % 128) + " result " + std::to_string(i));
            }
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// One step of a cell, and generation.

// Rows of values of both signs, of which every dtype holds each exactly; the last one ends with the buffer.
struct Rows {
  Rows(DType dtype, int64_t rows, int64_t columns, int seed, int64_t gap = 0)
      : tensor(dtype, shape(rows, columns), {columns + gap}, 1, seed),
        operand{tensor.buffer.data, columns + gap, nullptr} {}
  static Shape shape(int64_t rows, int64_t columns) {
    Shape s{};
    s.outer_dims = 1;
    s.outer[0] = s.rows = rows;
    s.inner = columns;
    return s;
  }
  Tensor tensor;
  RowsOperand operand;
};

// Two runs of one instruction set, in one piece and in two: sums of products have other bits elsewhere.
template <class Run>
void in_pieces(int64_t units, const std::vector<const Buffer*>& whole, const std::vector<const Buffer*>& parts,
               const std::string& what, const Run& run) {
  run(0, 0, units);
  run(1, units / 2, units);
  run(1, 0, units / 2);
  for (size_t i = 0; i < whole.size(); ++i) expect_same(*whole[i], *parts[i], what);
}

void test_cells(const char* isa) {
  const KernelTable& kernels = table(isa);
  const CellMode modes[] = {CellMode::kLstm, CellMode::kGru, CellMode::kTanh, CellMode::kRelu};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  for (const CellMode mode : modes) {
    for (const DType dtype : dtypes) {
      const size_t size = size_of(dtype);
      for (const int64_t hidden : {1, 3, 8, 17, 33}) {
        for (const int64_t inputs : {0, 1, 7, 16, 21}) {
          for (const int64_t batch : {1, 2, 3, 4, 5, 6, 7}) {
            if (inputs != 7 && batch > 1 && batch != 5) continue;
            const int64_t gates = gate_count(mode) * hidden;
            const std::string what = std::string(isa) + " cell " + std::to_string(int(mode)) + " dtype " +
                                     std::to_string(int(dtype)) + " hidden " + std::to_string(hidden) + " inputs " +
                                     std::to_string(inputs) + " batch " + std::to_string(batch);
            const Rows x(dtype, batch, inputs, 1, 3), h(dtype, batch, hidden, 2, 1), c(dtype, batch, hidden, 3),
                w_ih(dtype, gates, inputs, 4, 2), w_hh(dtype, gates, hidden, 5), bias(dtype, 1, gates, 6);
            const size_t state = size_t(batch * hidden) * size;
            Buffer h_1[2] = {Buffer(state), Buffer(state, 0xCD)}, c_1[2] = {Buffer(state), Buffer(state)},
                   kept[2] = {Buffer(size_t(saved_cell_gates(mode)) * state),
                              Buffer(size_t(saved_cell_gates(mode)) * state, 0xCD)};
            const size_t work = dtype == DType::kFloat64 ? 8 : 4;
            const size_t kept_cells = mode == CellMode::kLstm ? size_t(batch * hidden) * work : 0;
            Buffer cells[2] = {Buffer(kept_cells), Buffer(kept_cells, 0xCD)};
            CellParams p{};
            p.dtype = dtype;
            p.mode = mode;
            p.batch = batch;
            p.input_size = inputs;
            p.state_size = p.hidden_size = hidden;
            p.input = x.operand;
            p.h = h.operand;
            p.c = c.operand;
            p.w_ih = w_ih.operand;
            p.w_hh = w_hh.operand;
            if (inputs != 1) p.b_ih = p.b_hh = bias.operand.data;
            in_pieces((hidden + kCellUnits - 1) / kCellUnits, {&h_1[0], &c_1[0], &kept[0], &cells[0]},
                      {&h_1[1], &c_1[1], &kept[1], &cells[1]}, what, [&](int run, int64_t begin, int64_t end) {
                        p.h_1 = h_1[run].data;
                        p.c_1 = c_1[run].data;
                        p.gates = kept[run].data;
                        p.cells = mode == CellMode::kLstm ? cells[run].data : nullptr;
                        kernels.recurrent_cell(p, begin, end);
                      });

            // With layer norm or zoneout: units give the sums, and then rows the rest.
            const Rows gains(dtype, 1, gates, 9), of_cell(dtype, 1, hidden, 10);
            CellParams q = p;
            q.gates = q.cells = nullptr;
            q.zoneout_h = 0.25;
            if (mode == CellMode::kLstm) {
              q.zoneout_c = 0.5;
              if (batch % 2 == 1) {
                q.norm_ih = q.norm_hh = gains.operand.data;
                q.norm_c = q.norm_c_bias = of_cell.operand.data;
                q.norm_eps = 1e-5;
              }
            }
            const size_t all_sums = size_t(batch * cell_row_size(q)) * work;
            Buffer next_h[2] = {Buffer(state), Buffer(state, 0xCD)}, next_c[2] = {Buffer(state), Buffer(state)};
            for (int run = 0; run < 2; ++run) {
              Buffer sums(all_sums);
              q.sums = sums.data;
              q.h_1 = next_h[run].data;
              q.c_1 = next_c[run].data;
              const int64_t units = (hidden + kCellUnits - 1) / kCellUnits;
              const int64_t unit = run * (units / 2), row = run * (batch / 2);
              kernels.recurrent_cell(q, unit, units);
              kernels.recurrent_cell(q, 0, unit);
              kernels.recurrent_cell_rows(q, row, batch);
              kernels.recurrent_cell_rows(q, 0, row);
            }
            expect_same(next_h[0], next_h[1], what + " by rows, h");
            expect_same(next_c[0], next_c[1], what + " by rows, c");

            const bool gru = mode == CellMode::kGru;
            const Rows grad_h(dtype, batch, hidden, 7), grad_c(dtype, batch, hidden, 8);
            const size_t to_gates = size_t(batch * gates) * work, direct = gru ? size_t(batch * hidden) * work : 0;
            Buffer to_ih[2] = {Buffer(to_gates), Buffer(to_gates, 0xCD)},
                   to_hh[2] = {Buffer(gru ? to_gates : 0), Buffer(gru ? to_gates : 0, 0xCD)},
                   to_h[2] = {Buffer(direct), Buffer(direct, 0xCD)}, to_c[2] = {Buffer(state), Buffer(state)};
            CellBackwardParams b{};
            b.dtype = dtype;
            b.mode = mode;
            b.batch = batch;
            b.hidden_size = hidden;
            b.grad_h_1 = grad_h.operand.data;
            b.grad_c_1 = batch % 2 ? nullptr : grad_c.operand.data;
            b.h = h.operand;
            b.c = c.operand.data;
            b.gates = kept[0].data;
            b.cells = cells[0].data;
            in_pieces(batch, {&to_ih[0], &to_hh[0], &to_h[0], &to_c[0]}, {&to_ih[1], &to_hh[1], &to_h[1], &to_c[1]},
                      what + " backward", [&](int run, int64_t begin, int64_t end) {
                        b.to_gates_ih = to_ih[run].data;
                        b.to_gates_hh = gru ? to_hh[run].data : b.to_gates_ih;
                        b.direct = to_h[run].data;
                        b.grad_c = to_c[run].data;
                        kernels.recurrent_cell_backward(b, begin, end);
                      });
          }
        }
      }
    }
  }
}

void test_linear_backward(const char* isa) {
  const KernelTable& kernels = table(isa);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    const DType work = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
    const size_t size = size_of(dtype);
    for (const int64_t outputs : {1, 9, 33, 129}) {
      for (const int64_t inputs : {0, 1, 40, 130}) {
        for (const int64_t batch : {1, 2, 4, 7, 65}) {
          const std::string what = std::string(isa) + " linear backward dtype " + std::to_string(int(dtype)) +
                                   " outputs " + std::to_string(outputs) + " inputs " + std::to_string(inputs) +
                                   " batch " + std::to_string(batch);
          const Rows grad(work, batch, outputs, 1), direct(work, batch, inputs, 2), x(dtype, batch, inputs, 3, 2),
              w(dtype, outputs, inputs, 4, 1);
          const size_t of_x = size_t(batch * inputs) * size, of_w = size_t(outputs * inputs) * size,
                       of_bias = size_t(outputs) * size;
          Buffer to_x[2] = {Buffer(of_x), Buffer(of_x, 0xCD)}, to_w[2] = {Buffer(of_w), Buffer(of_w, 0xCD)},
                 to_bias[2] = {Buffer(of_bias), Buffer(of_bias, 0xCD)};
          LinearRowsBackwardParams p{};
          p.dtype = dtype;
          p.batch = batch;
          p.inputs = inputs;
          p.outputs = outputs;
          p.grad_y = grad.operand.data;
          p.direct = batch == 2 ? direct.operand.data : nullptr;
          p.x = x.operand;
          p.w = w.operand;
          const auto point = [&](int run) {
            p.grad_x = to_x[run].data;
            p.grad_w = to_w[run].data;
            p.grad_bias = to_bias[run].data;
          };
          point(0);
          in_pieces(linear_backward_units(p), {&to_x[0], &to_w[0], &to_bias[0]}, {&to_x[1], &to_w[1], &to_bias[1]},
                    what, [&](int run, int64_t begin, int64_t end) {
                      point(run);
                      kernels.linear_rows_backward(p, begin, end);
                    });
        }
      }
    }
  }
}

void test_generation(const char* isa) {
  const KernelTable& kernels = table(isa);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t outputs : {1, 4, 9, 16, 40, 101}) {
      for (const int64_t batch : {1, 3, 7}) {
        const int64_t inputs = outputs % 23;
        const std::string what = std::string(isa) + " generation dtype " + std::to_string(int(dtype)) + " outputs " +
                                 std::to_string(outputs) + " batch " + std::to_string(batch);
        const Rows x(dtype, batch, inputs, 1, 2), w(dtype, outputs, inputs, 2, 1), bias(dtype, 1, outputs, 3);
        const size_t bytes = size_t(batch * outputs) * size_of(dtype);
        Buffer y[2] = {Buffer(bytes), Buffer(bytes, 0xCD)};
        LinearRowsParams p{};
        p.dtype = dtype;
        p.batch = batch;
        p.inputs = inputs;
        p.outputs = outputs;
        p.x = x.operand;
        p.w = w.operand;
        p.bias = batch == 3 ? nullptr : bias.operand.data;
        in_pieces((outputs + kLinearOutputs - 1) / kLinearOutputs, {&y[0]}, {&y[1]}, what,
                  [&](int run, int64_t begin, int64_t end) {
                    p.y = y[run].data;
                    kernels.linear_rows(p, begin, end);
                  });

        // A draw has one result on every instruction set.
        const Buffer seen(size_t(batch * outputs), 1);
        std::vector<int64_t> seen_rows(static_cast<size_t>(batch));
        std::vector<uint64_t> seeds(seen_rows.size()), elements(seen_rows.size());
        for (size_t i = 0; i < seeds.size(); ++i) {
          seen_rows[i] = batch - 1 - int64_t(i);
          seeds[i] = i * 977;
          elements[i] = ~uint64_t(0) - i;
        }
        for (int option = 0; option < 12; ++option) {
          DrawParams d{};
          d.dtype = dtype;
          d.vocabulary = outputs;
          d.logits = y[0].data;
          d.seen = option % 2 ? reinterpret_cast<const bool*>(seen.data) : nullptr;
          d.seen_rows = seen_rows.data();
          d.seeds = seeds.data();
          d.elements = elements.data();
          d.temperature = option % 3 == 0 ? 0 : 7;
          d.top_k = option % 4 == 1 ? 3 : 0;
          d.top_p = option % 4 == 2 ? 0.7 : 1;
          d.min_p = option == 7 ? 0.2 : 0;
          d.repetition_penalty = 1.5;
          const size_t tokens = size_t(batch) * sizeof(int64_t);
          Buffer drawn[2] = {Buffer(tokens), Buffer(tokens, 0xCD)}, weights(size_t(batch * outputs) * sizeof(int64_t));
          d.weights = reinterpret_cast<int64_t*>(weights.data);
          for (int run = 0; run < 2; ++run) {
            d.tokens = reinterpret_cast<int64_t*>(drawn[run].data);
            table(run == 0 ? "generic" : isa).draw_tokens(d, 0, batch);
          }
          expect_same(drawn[0], drawn[1], what + " option " + std::to_string(option));
        }
      }
    }
  }
}

// (batch, heads, rows, width) in a buffer that ends with its last element: dense, heads inside rows, or every second
// element.
struct Dense4 {
  Dense4(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width, int layout, int seed)
      : buffer(size_t(((layout == 2 ? 2 : 1) * (batch * heads * rows * width - 1) + 1)) * size_of(dtype)) {
    const int64_t step = layout == 2 ? 2 : 1;
    fill(buffer, dtype, seed, 0.25);
    tensor.data = buffer.data;
    tensor.stride[0] = batch == 1 ? 0 : heads * rows * width * step;
    tensor.stride[1] = (layout == 1 ? width : rows * width) * step;
    tensor.stride[2] = (layout == 1 ? heads * width : width) * step;
    tensor.stride[3] = step;
  }
  Buffer buffer;
  Tensor4 tensor{};
};

// All units in order, then, with other scratch, in reverse.
template <class Run>
void in_both_orders(int64_t units, int64_t scratch, const Run& run) {
  for (int order = 0; order < 2; ++order) {
    Buffer own(size_t(scratch), order == 0 ? 0xAB : 0xFF);
    for (int64_t i = 0; i < units; ++i) run(order, order == 0 ? i : units - 1 - i, own.data);
  }
}

void test_attention(const char* isa) {
  const KernelTable& kernels = table(isa);
  struct Case {
    int64_t batch, heads, kv_heads, queries, keys, width, value_width, left, right;
    int mask;  // 0 none, 1 bool, 2 added, 3 added, the same for all queries
    bool slopes, drops, lower_right;
    double softcap;
    int layout;
    std::vector<int64_t> query_starts, key_starts;
  };
  const int64_t far = kUnlimited;
  const Case cases[] = {
      {1, 4, 2, 1, 5, 8, 8, far, far, 0, false, false, true, 0, 0, {}, {}},
      {2, 2, 1, 1, 16, 9, 33, 3, 0, 1, false, false, true, 0, 1, {}, {}},
      {1, 3, 1, 2, 600, 9, 33, far, 0, 2, true, false, true, 3, 1, {}, {}},
      {2, 2, 1, 7, 9, 3, 5, far, 0, 1, false, true, false, 0, 2, {}, {}},
      {1, 2, 2, 70, 140, 17, 20, 30, 0, 2, true, false, true, 5, 1, {}, {}},
      {1, 1, 1, 131, 300, 16, 16, far, far, 3, false, true, false, 0, 0, {}, {}},
      {1, 1, 1, 20, 20, 1, 1, far, 0, 0, false, false, false, 0, 0, {}, {}},
      {3, 2, 1, 80, 90, 16, 7, far, 0, 0, true, false, false, 0, 0, {0, 5, 5, 80}, {0, 9, 12, 90}},
  };
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  for (const Case& c : cases) {
    for (const DType dtype : dtypes) {
      const bool ragged = !c.query_starts.empty();
      const int64_t batch = ragged ? 1 : c.batch, work = dtype == DType::kFloat64 ? 8 : 4;
      const DType work_dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
      const std::string what = std::string(isa) + " attention dtype " + std::to_string(int(dtype)) + " queries " +
                               std::to_string(c.queries) + " keys " + std::to_string(c.keys);
      const Dense4 query(dtype, batch, c.heads, c.queries, c.width, c.layout, 1),
          key(dtype, batch, c.kv_heads, c.keys, c.width, c.layout, 2),
          value(dtype, batch, c.kv_heads, c.keys, c.value_width, c.layout, 3),
          grad_out(dtype, batch, c.heads, c.queries, c.value_width, c.layout, 4);
      const int64_t mask_queries = c.mask == 3 ? 1 : c.queries;
      const Dense4 mask(c.mask == 1 ? DType::kFloat16 : dtype, 1, c.heads, mask_queries, c.keys, 0, 5);
      Buffer bools(size_t(c.heads * mask_queries * c.keys));
      for (size_t i = 0; i < bools.size; ++i) bools.data[i] = i % 3 != 0;
      Buffer slopes(size_t(c.heads * work));
      fill(slopes, work_dtype, 6, 0.1);

      AttentionBackwardParams p{};
      p.dtype = dtype;
      p.mask_dtype = c.mask == 1 ? DType::kBool : dtype;
      p.batch = c.batch;
      p.heads = c.heads;
      p.kv_heads = c.kv_heads;
      p.queries = c.queries;
      p.keys = c.keys;
      p.width = c.width;
      p.value_width = c.value_width;
      p.query = query.tensor;
      p.key = key.tensor;
      p.value = value.tensor;
      if (ragged) {
        p.query_starts = c.query_starts.data();
        p.key_starts = c.key_starts.data();
      }
      if (c.mask > 0) {
        p.mask = mask.tensor;
        if (c.mask == 3) p.mask.stride[2] = 0;
        if (c.mask == 1) p.mask.data = bools.data;
      }
      if (c.slopes) {
        p.slopes = slopes.data;
        p.slope_head = 1;
      }
      p.scale = 0.3;
      p.softcap = c.softcap;
      p.left = c.left;
      p.right = c.right;
      p.lower_right = c.lower_right;
      p.keep = c.drops ? uint64_t(3) << 30 : uint64_t(1) << 32;
      p.kept_weight = c.drops ? 4.0 / 3 : 1;
      p.seed = 7;
      p.offset = 3;

      const size_t size = size_of(dtype), rows = size_t(batch * c.heads * c.queries);
      Dense4 out[2] = {{dtype, batch, c.heads, c.queries, c.value_width, 0, 8},
                       {dtype, batch, c.heads, c.queries, c.value_width, 0, 9}};
      Buffer lse[2] = {Buffer(rows * size_t(work)), Buffer(rows * size_t(work), 0xCD)};
      AttentionSizes sizes = kernels.attention_sizes(p);
      std::vector<int64_t> first_units;
      const auto plan = [&](int64_t heads, const std::vector<int64_t>& starts, int64_t length) {
        first_units.assign(1, 0);
        for (size_t n = 0; n + 1 < starts.size(); ++n) {
          first_units.push_back(first_units.back() + heads * ((starts[n + 1] - starts[n] + length - 1) / length));
        }
        p.first_units = first_units.data();
        return first_units.back();
      };
      if (ragged) sizes.units = plan(c.heads, c.query_starts, sizes.unit_queries);
      Buffer sums[2] = {Buffer(size_t(sizes.sums)), Buffer(size_t(sizes.sums), 0xCD)};
      const auto forward = [&](AttentionPhase phase, int64_t units, int64_t scratch) {
        in_both_orders(units, scratch, [&](int order, int64_t unit, void* own) {
          p.out = out[order].tensor;
          p.lse = lse[order].data;
          p.sums = sums[order].data;
          kernels.attention(p, phase, unit, own);
        });
      };
      forward(AttentionPhase::kKeys, sizes.units, sizes.scratch);
      forward(AttentionPhase::kJoin, sizes.join_units, 1);
      expect_same(out[0].buffer, out[1].buffer, what);
      expect_same(lse[0], lse[1], what + " lse");

      p.out = out[0].tensor;
      p.lse = lse[0].data;
      p.grad_out = grad_out.tensor;
      p.rows = int64_t(rows);
      p.most_queries = p.queries;
      p.most_keys = p.keys;
      p.chunk = 256;
      p.most_chunks = (p.keys + 255) / 256;
      Dense4 grads[2][3] = {{{dtype, batch, c.heads, c.queries, c.width, 0, 10},
                             {dtype, batch, c.kv_heads, c.keys, c.width, 0, 11},
                             {dtype, batch, c.kv_heads, c.keys, c.value_width, 0, 12}},
                            {{dtype, batch, c.heads, c.queries, c.width, 0, 10},
                             {dtype, batch, c.kv_heads, c.keys, c.width, 0, 13},
                             {dtype, batch, c.kv_heads, c.keys, c.value_width, 0, 14}}};
      const size_t of_mask = size_t(c.heads * mask_queries * c.keys) * size;
      Buffer grad_mask[2] = {Buffer(of_mask), Buffer(of_mask, 0xCD)};
      const size_t of_sums = size_t(p.most_chunks) * rows * size_t(c.width * work);
      Buffer query_sums[2] = {Buffer(of_sums), Buffer(of_sums, 0xCD)};
      const size_t of_slopes = size_t(c.batch * c.heads * p.most_chunks) * sizeof(double);
      Buffer slope_sums[2] = {Buffer(of_slopes, 0), Buffer(of_slopes, 0)};
      if (c.mask > 1) {
        const int64_t mask_size[4] = {1, c.heads, mask_queries, c.keys};
        for (int d = 0; d < 4; ++d) p.mask_size[d] = mask_size[d];
      }
      const auto point = [&](int order) {
        p.grad_query = grads[order][0].tensor;
        p.grad_key = grads[order][1].tensor;
        p.grad_value = grads[order][2].tensor;
        p.grad_mask = c.mask > 1 ? grad_mask[order].data : nullptr;
        p.query_sums = p.most_chunks > 1 ? query_sums[order].data : nullptr;
        p.slope_sums = c.slopes ? reinterpret_cast<double*>(slope_sums[order].data) : nullptr;
      };
      point(0);
      AttentionBackwardSizes back = kernels.attention_backward_sizes(p);
      if (ragged) back.units = plan(c.kv_heads, c.key_starts, p.chunk);
      const auto backward = [&](AttentionBackwardPhase phase, int64_t units, int64_t scratch) {
        in_both_orders(units, scratch, [&](int order, int64_t unit, void* own) {
          point(order);
          kernels.attention_backward(p, phase, unit, own);
        });
      };
      backward(AttentionBackwardPhase::kMask, back.mask_units, back.mask_scratch);
      backward(AttentionBackwardPhase::kKeys, back.units, back.scratch);
      if (p.most_chunks > 1) backward(AttentionBackwardPhase::kQueries, c.batch * c.heads, 1);
      for (int i = 0; i < 3; ++i) {
        expect_same(grads[0][i].buffer, grads[1][i].buffer, what + " gradient " + std::to_string(i));
      }
      if (c.mask > 1) expect_same(grad_mask[0], grad_mask[1], what + " gradient of the mask");
      if (c.slopes) expect_same(slope_sums[0], slope_sums[1], what + " gradient of the slopes");
    }
  }
}

void test_matrix(const char* isa) {
  const KernelTable& kernels = table(isa);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const int64_t rows : {1, 5, 13, 100}) {
      for (const int64_t columns : {1, 15, 64, 70}) {
        for (const int64_t depth : {0, 1, 130, 1030}) {
          for (const int orders : {0, 1, 2}) {  // by rows; right by columns; left by columns
            if (depth > 1000 && rows * columns > 1000) continue;
            if (orders == 2 && rows == 1) continue;  // that is a row
            const Rows left(dtype, orders == 2 ? depth : rows, orders == 2 ? rows : depth, 1),
                right(dtype, orders == 1 ? columns : depth, orders == 1 ? depth : columns, 2),
                bias(dtype, 1, columns, 3);
            const size_t bytes = size_t(rows * columns) * size_of(dtype);
            Buffer out[2] = {Buffer(bytes), Buffer(bytes, 0xCD)};
            MatrixParams p{};
            p.dtype = dtype;
            p.rows = rows;
            p.columns = columns;
            p.depth = depth;
            p.left = left.operand.data;
            p.left_row = orders == 2 ? 1 : depth;
            p.left_step = orders == 2 ? rows : 1;
            p.right = right.operand.data;
            p.right_row = orders == 1 ? 1 : columns;
            p.right_column = orders == 1 ? depth : 1;
            if (orders != 2) p.bias = bias.operand.data;
            for (int run = 0; run < 2; ++run) {  // split for one thread, and for three
              const MatrixSizes sizes = kernels.matrix_sizes(p, run == 0 ? 1 : 3);
              Buffer scratch(size_t(sizes.scratch));
              p.out = out[run].data;
              for (int64_t unit = sizes.units - 1; unit >= 0; --unit) {
                kernels.matrix_product(p, sizes, unit, scratch.data);
              }
            }
            expect_same(out[0], out[1],
                        std::string(isa) + " matrix " + std::to_string(rows) + " x " + std::to_string(depth) + " x " +
                            std::to_string(columns) + " orders " + std::to_string(orders));
          }
        }
      }
    }
  }
}

void test_activations(const char* isa) {
  const KernelTable& kernels = table(isa);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (const Activation activation : {Activation::kGelu, Activation::kGeluTanh, Activation::kSwiglu}) {
      for (const int64_t rows : {1, 5, 64, 130}) {
        for (const int64_t width : {1, 15, 16, 33}) {
          const int64_t inputs = activation == Activation::kSwiglu ? 2 * width : width;
          const int64_t blocks = (rows + kActivationRows - 1) / kActivationRows;
          const Rows input(dtype, rows, inputs, 1), grad(dtype, rows, width, 2), bias(dtype, 1, width, 3);
          const size_t work = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
          const std::string what = std::string(isa) + " activation " + std::to_string(int(activation)) + " dtype " +
                                   std::to_string(int(dtype)) + " " + std::to_string(rows) + " x " +
                                   std::to_string(width);
          Buffer out[2] = {Buffer(rows * width * size_of(dtype)), Buffer(rows * width * size_of(dtype), 0xCD)};
          Buffer grad_input[2] = {Buffer(rows * inputs * size_of(dtype)), Buffer(rows * inputs * size_of(dtype), 0xCD)};
          Buffer grad_bias[2] = {Buffer(width * size_of(dtype)), Buffer(width * size_of(dtype), 0xCD)};
          ActivationBackwardParams p{};
          p.activation = activation;
          p.dtype = p.bias_dtype = dtype;
          p.rows = rows;
          p.width = width;
          p.input = input.operand.data;
          p.grad = grad.operand.data;
          for (int run = 0; run < 2; ++run) {  // in one piece, and piece by piece from the end
            Buffer sums(size_t(blocks * width) * work, 0xAB);
            p.out = out[run].data;
            p.grad_input = grad_input[run].data;
            if (activation != Activation::kSwiglu) {
              p.bias = bias.operand.data;
              p.sums = sums.data;
              p.grad_bias = grad_bias[run].data;
            }
            const int64_t piece = run == 0 ? rows : 1, block = run == 0 ? blocks : 1;
            for (int64_t row = rows - piece; row >= 0; row -= piece) kernels.activation(p, row, row + piece);
            for (int64_t b = blocks - block; b >= 0; b -= block) kernels.activation_backward(p, b, b + block);
            if (p.sums != nullptr) kernels.activation_add_blocks(p, 0, width);
          }
          expect_same(out[0], out[1], what);
          expect_same(grad_input[0], grad_input[1], what + " gradient");
          if (p.sums != nullptr) expect_same(grad_bias[0], grad_bias[1], what + " gradient of the bias");
        }
      }
    }
  }
}

void test_probes(const char* isa) {
  const KernelTable& kernels = table(isa);
  for (const int64_t count : {0, 1, 63, 64, 1000}) {
    Buffer memory(count * 4);
    float* values = reinterpret_cast<float*>(memory.data);
    for (int64_t i = 0; i < count; ++i) values[i] = 1.0f;
    const double read = kernels.probe.reads(values, count, 3);
    if (!(read >= 0 && read <= 3 * double(count) && read + 3 * 128 > 3 * double(count))) {
      printf("%s reads %ld: %g\n", isa, long(count), read);
      exit(1);
    }
    ++comparisons;
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    test_random(argv[i]);
    test_reparameterize(argv[i]);
    test_recurrent(argv[i]);
    test_probes(argv[i]);
    test_cells(argv[i]);
    test_linear_backward(argv[i]);
    test_generation(argv[i]);
    test_attention(argv[i]);
    test_matrix(argv[i]);
    test_activations(argv[i]);
  }
  printf("%ld comparisons\n", comparisons);
  return comparisons > 0 ? 0 : 1;
}
