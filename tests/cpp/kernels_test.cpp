// The kernel tables of csrc/cpu under the sanitizers, without torch: every kernel, instruction set and dtype
// on heap buffers of exactly the size that the parameters name, so that a read or write one element out of
// place stops the program. Every result must have the bits of the generic kernels run in one piece.
// Usage: kernels_test [isa ...]; prints the number of comparisons.
#include <cmath>
#include <cstdio>
#include <cstdlib>
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
  fprintf(stderr, "%s: differs from the generic kernels at byte %zu of %zu\n", what.c_str(), at, a.size);
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

// A tensor of `rows` (as extents) by `inner`, with the given strides in elements, in a buffer that ends with
// its last element.
struct Tensor {
  Tensor(DType dtype, const Shape& shape, const std::vector<int64_t>& outer_stride, int64_t inner_stride, int seed)
      : buffer(elements(shape, outer_stride, inner_stride) * size_of(dtype)) {
    for (size_t i = 0; i < buffer.size / size_of(dtype); ++i) {
      const double x = double(int((i * 37 + size_t(seed) * 11) % 101) - 50) / 16;  // exact in every dtype
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

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    test_random(argv[i]);
    test_reparameterize(argv[i]);
  }
  printf("%ld comparisons\n", comparisons);
  return comparisons > 0 ? 0 : 1;
}
