// fastgen::reparameterize, reparameterize_kl and their backwards on CUDA; the algebra is that of
// cpu/reparameterize.inl, the noise is the CPU's, bit for bit (compile with -fmad=false).
//
// Work is dealt out in Philox blocks: a thread makes the four (fp64: two) normals of a block and takes the
// elements they belong to through the formula. Three ways to deal, by what must be summed:
//   kFlat   one row, the whole grid      no KL, contiguous: bandwidth bound
//   kWarp   a warp a row                 rows up to a few thousand elements
//   kBlock  a thread block a row         longer rows
#include <algorithm>

#define FASTGEN_GENERIC_BLOCKS 1
#include "../cpu/vec_generic.h"
// After vec_generic.h, which defines Isa:
#include "../common/distributions.h"
#include "../torch/reparameterize_ops.h"
#include "check.h"
#include "device.h"

namespace fastgen {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kLongRow = 4096;

enum class Deal { kFlat, kWarp, kBlock };

// The scalar forms of math.h.
template <class T>
struct Scalar;
template <>
struct Scalar<float> {
  using F = Lanes<float, 1>;
  using U = Lanes<uint32_t, 1>;
};
template <>
struct Scalar<double> {
  using F = Lanes<double, 1>;
  using U = Lanes<uint64_t, 1>;
};
template <class T>
__device__ Exponentials<T> exponentials_of(T x) {
  const auto e = exponentials<T, typename Scalar<T>::U>(typename Scalar<T>::F(x));
  return {e.of_half.v[0], e.minus_1.v[0], e.minus_1_minus.v[0]};
}

// The normals of a block, in element order.
template <class T>
__device__ void block_normals(uint64_t block, const PhiloxKey& key, T (&out)[Work<T>::kPerBlock]) {
  typename Work<T>::U even[1], odd[1];
  typename Work<T>::F y, y_odd, low, high;
  words<T>(block, key, even, odd);
  normal_pair<T>(even[0], odd[0], y, y_odd);
  interleave(y, y_odd, low, high);
  store(out, low);
  store(out + Work<T>::kPerBlock / 2, high);
}

template <class Storage, int N>
__device__ bool in_one_access(const Storage* p) {
  return N > 1 && reinterpret_cast<uintptr_t>(p) % sizeof(Pack<Storage, N>) == 0;
}

// N adjacent elements: a whole block of the stream, or one.
template <class Storage, int N>
__device__ void save(const typename WorkType<Storage>::T (&values)[N], Storage* p) {
  Pack<Storage, N> pack;
  for (int i = 0; i < N; ++i) narrow(values[i], &pack.v[i]);
  if (in_one_access<Storage, N>(p)) {
    *reinterpret_cast<Pack<Storage, N>*>(p) = pack;
  } else {
    for (int i = 0; i < N; ++i) p[i] = pack.v[i];
  }
}

// One row of an operand.
template <class Storage>
struct DeviceRow {
  using T = typename WorkType<Storage>::T;
  const Storage* p;
  int64_t stride;
  __device__ DeviceRow(const Operand& operand, const Shape& shape, int64_t row)
      : p(static_cast<const Storage*>(operand.data)), stride(operand.inner_stride) {
    if (p != nullptr) p += row_offset(shape, operand.outer_stride, row);
  }
  template <int N>
  __device__ void load(int64_t column, T (&values)[N]) const {
    if (stride == 1 && in_one_access<Storage, N>(p + column)) {
      const auto pack = *reinterpret_cast<const Pack<Storage, N>*>(p + column);
      for (int i = 0; i < N; ++i) values[i] = widen(pack.v[i]);
    } else {
      for (int i = 0; i < N; ++i) values[i] = widen(p[(column + i) * stride]);
    }
  }
};

template <class Storage, bool kWithKl>
struct Forward {
  using T = typename WorkType<Storage>::T;
  static constexpr bool kSums = kWithKl;
  ReparameterizeParams p;

  struct OfRow {
    DeviceRow<Storage> mu, logvar, eps;
    Storage* z;
    // Returns the elements' part of twice the divergence.
    template <int N>
    __device__ T operator()(int64_t column, T (&noise)[N]) const {
      T m[N], v[N], result[N], sum = 0;
      mu.load(column, m);
      logvar.load(column, v);
      if (eps.p != nullptr) eps.load(column, noise);
      for (int i = 0; i < N; ++i) {
        const Exponentials<T> e = exponentials_of(v[i]);
        result[i] = m[i] + e.of_half * noise[i];
        if (kWithKl) sum = sum + (m[i] * m[i] + e.minus_1_minus);
      }
      save(result, z + column);
      return sum;
    }
  };
  __device__ OfRow row(int64_t r) const {
    return {{p.mu, p.shape, r},
            {p.logvar, p.shape, r},
            {p.eps, p.shape, r},
            static_cast<Storage*>(p.z) + r * p.shape.inner};
  }
  __device__ void finish(int64_t r, T sum) const { narrow(T(0.5) * sum, static_cast<Storage*>(p.kl) + r); }
};

template <class Storage>
struct Backward {
  using T = typename WorkType<Storage>::T;
  static constexpr bool kSums = false;
  ReparameterizeBackwardParams p;

  struct OfRow {
    DeviceRow<Storage> grad_z, grad_kl, mu, logvar, eps;
    Storage *grad_mu, *grad_logvar;
    template <int N>
    __device__ T operator()(int64_t column, T (&noise)[N]) const {
      T v[N], to_mu[N] = {}, to_logvar[N] = {};
      logvar.load(column, v);
      Exponentials<T> e[N];
      for (int i = 0; i < N; ++i) e[i] = exponentials_of(v[i]);
      if (grad_z.p != nullptr) {
        if (eps.p != nullptr) eps.load(column, noise);
        grad_z.load(column, to_mu);
        for (int i = 0; i < N; ++i) to_logvar[i] = to_mu[i] * (e[i].of_half * noise[i]);
      }
      if (grad_kl.p != nullptr) {
        T gk[N], m[N];
        grad_kl.load(column, gk);
        mu.load(column, m);
        for (int i = 0; i < N; ++i) {
          to_mu[i] = to_mu[i] + gk[i] * m[i];
          to_logvar[i] = to_logvar[i] + gk[i] * e[i].minus_1;
        }
      }
      for (int i = 0; i < N; ++i) to_logvar[i] = T(0.5) * to_logvar[i];
      save(to_logvar, grad_logvar + column);
      if (grad_mu != nullptr) save(to_mu, grad_mu + column);
      return T(0);
    }
  };
  __device__ OfRow row(int64_t r) const {
    const int64_t start = r * p.shape.inner;
    return {{p.grad_z, p.shape, r},
            {p.grad_kl, p.shape, r},
            {p.mu, p.shape, r},
            {p.logvar, p.shape, r},
            {p.eps, p.shape, r},
            p.grad_mu == nullptr ? nullptr : static_cast<Storage*>(p.grad_mu) + start,
            static_cast<Storage*>(p.grad_logvar) + start};
  }
  __device__ void finish(int64_t, T) const {}
};

template <class T>
__device__ T warp_sum(T value) {
  for (int step = 16; step > 0; step /= 2) value = value + shuffle_xor(value, step);
  return value;
}

template <Deal kDeal, class Op>
__global__ void __launch_bounds__(kThreads) reparameterize_kernel(Op op, const int64_t* __restrict__ seed_offset) {
  using T = typename Op::T;
  constexpr int kPerBlock = Work<T>::kPerBlock;
  const Shape& shape = op.p.shape;
  const bool draw = seed_offset != nullptr;
  const uint64_t seed = draw ? uint64_t(seed_offset[0]) : 0, offset = draw ? uint64_t(seed_offset[1]) : 0;
  const PhiloxKey key(seed);

  // The members of a team share a row: `member` of `members`, `team` of `teams`.
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, all = int64_t(gridDim.x) * kThreads;
  constexpr int kTeam = kDeal == Deal::kWarp ? 32 : kThreads;
  const int64_t member = kDeal == Deal::kFlat ? thread : threadIdx.x % kTeam;
  const int64_t members = kDeal == Deal::kFlat ? all : kTeam;
  const int64_t team = kDeal == Deal::kFlat ? 0 : thread / kTeam, teams = kDeal == Deal::kFlat ? 1 : all / kTeam;

  for (int64_t row = team; row < shape.rows; row += teams) {
    const auto of_row = op.row(row);
    const uint64_t first = offset + uint64_t(row * shape.inner);  // the row's first element of the stream
    const int lead = int(first % kPerBlock);
    const int64_t blocks = (lead + shape.inner + kPerBlock - 1) / kPerBlock;
    T sum = 0;
    for (int64_t b = member; b < blocks; b += members) {
      T noise[kPerBlock] = {};
      if (draw) block_normals<T>(first / kPerBlock + uint64_t(b), key, noise);
      const int64_t column = b * kPerBlock - lead;
      if (column >= 0 && column + kPerBlock <= shape.inner) {
        sum = sum + of_row(column, noise);
        continue;
      }
      for (int i = 0; i < kPerBlock; ++i) {
        T one[1] = {noise[i]};
        if (column + i >= 0 && column + i < shape.inner) sum = sum + of_row(column + i, one);
      }
    }
    if (Op::kSums) {
      sum = warp_sum(sum);
      if (kDeal == Deal::kBlock) {
        T* parts = reinterpret_cast<T*>(dynamic_shared());  // [kWarps]
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
        block_barrier();
        sum = warp_sum(threadIdx.x % 32 < kWarps ? parts[threadIdx.x % 32] : T(0));
        block_barrier();
      }
      if (member == 0) op.finish(row, sum);
    }
  }
}

template <class Op>
void launch_by_rows(const Op& op, const int64_t* seed_offset, cudaStream_t stream) {
  using T = typename Op::T;
  const Shape& shape = op.p.shape;
  constexpr int64_t kMaxGrid = 132 * 16;  // about two waves of an H100; the rest by striding
  const auto run = [&](auto kernel, int64_t threads, size_t shared) {
    const auto grid = unsigned(std::max<int64_t>(1, std::min<int64_t>(ceil_div(threads, kThreads), kMaxGrid)));
    launch(kernel, grid, kThreads, shared, stream, op, seed_offset);
  };
  if (!Op::kSums && shape.rows == 1) {
    run(reparameterize_kernel<Deal::kFlat, Op>, ceil_div(shape.inner, Work<T>::kPerBlock) + 1, 0);
  } else if (shape.inner <= kLongRow) {
    run(reparameterize_kernel<Deal::kWarp, Op>, shape.rows * 32, 0);
  } else {
    run(reparameterize_kernel<Deal::kBlock, Op>, shape.rows * kThreads, Op::kSums ? kWarps * sizeof(T) : 0);
  }
}

struct CudaReparameterize {
  static Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dims) {
    return torch::stable::new_empty(like, {sizes, size_t(dims)});
  }

  static void run(ReparameterizeParams& p, const std::optional<Tensor>& seed_offset, const Tensor& like) {
    const OnDevice device(like);
    Tensor keep;
    const int64_t* pointer = seed_offset_pointer(seed_offset, keep);
    const cudaStream_t stream = current_stream(like);
    by_dtype(p.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      if (p.kl != nullptr) {
        launch_by_rows(Forward<Storage, true>{p}, pointer, stream);
      } else {
        launch_by_rows(Forward<Storage, false>{p}, pointer, stream);
      }
    });
  }

  static void run(ReparameterizeBackwardParams& p, const std::optional<Tensor>& seed_offset, const Tensor& like) {
    const OnDevice device(like);
    Tensor keep;
    const int64_t* pointer = p.grad_z.data != nullptr ? seed_offset_pointer(seed_offset, keep) : nullptr;
    const cudaStream_t stream = current_stream(like);
    by_dtype(p.dtype, [&](auto storage) { launch_by_rows(Backward<decltype(storage)>{p}, pointer, stream); });
  }

 private:
  template <class Body>
  static void by_dtype(DType dtype, const Body& body) {
    switch (dtype) {
      case DType::kFloat64: return body(double{});
      case DType::kBFloat16: return body(BFloat16{});
      case DType::kFloat16: return body(Float16{});
      default: return body(float{});
    }
  }
};

}  // namespace
}  // namespace fastgen

FASTGEN_CUDA_OPS(m) {
  using Ops = fastgen::ReparameterizeOps<fastgen::CudaReparameterize>;
  m.impl("reparameterize", TORCH_BOX(&Ops::reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&Ops::reparameterize_backward));
  m.impl("reparameterize_kl", TORCH_BOX(&Ops::reparameterize_kl));
  m.impl("reparameterize_kl_backward", TORCH_BOX(&Ops::reparameterize_kl_backward));
}
