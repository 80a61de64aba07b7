// fastgen::random_bits, uniform, normal, exponential, bernoulli on CUDA: the CPU's stream, a Philox block a
// thread. Compiled with -fmad=false, so that the normals have the CPU's bits too.
#define FASTGEN_GENERIC_BLOCKS 1
#include "../cpu/vec_generic.h"
// After vec_generic.h, which defines Isa:
#include "../common/distributions.h"
#include "../torch/random_ops.h"
#include "check.h"
#include "device.h"

namespace fastgen {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Affine {  // after the distribution: mean + std z, or nothing
  T mean, std;
  bool on;
  __device__ T operator()(T z) const { return on ? mean + std * z : z; }
};

// grid: (blocks of the stream, streams). out[stream][0 .. count)
template <class T, class Storage, class Dist>
__global__ void fill_kernel(Storage* __restrict__ out, int64_t count, const int64_t* __restrict__ seed_offset,
                            Dist distribution, Affine<T> affine, Storage below, bool clamp) {
  constexpr int kPerBlock = Work<T>::kPerBlock;
  using F = typename Work<T>::F;
  const uint64_t seed = uint64_t(seed_offset[2 * blockIdx.y]), offset = uint64_t(seed_offset[2 * blockIdx.y + 1]);
  out += int64_t(blockIdx.y) * count;
  const int lead = int(offset % kPerBlock);
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = thread * kPerBlock - lead;  // of this block's elements
  if (first >= count) return;

  typename Work<T>::U even[1], odd[1];
  F y, y_odd, low, high;
  words<T>(offset / kPerBlock + uint64_t(thread), PhiloxKey(seed), even, odd);
  distribution(even[0], odd[0], y, y_odd);
  interleave(y, y_odd, low, high);
  T value[kPerBlock];
  store(value, low);
  store(value + kPerBlock / 2, high);

  Pack<Storage, kPerBlock> pack;
  for (int i = 0; i < kPerBlock; ++i) {
    narrow(affine(value[i]), &pack.v[i]);
    if (clamp && widen(pack.v[i]) > widen(below)) pack.v[i] = below;
  }
  if (lead == 0 && count % kPerBlock == 0) {
    *reinterpret_cast<Pack<Storage, kPerBlock>*>(out + first) = pack;
  } else {
    for (int i = 0; i < kPerBlock; ++i) {
      if (first + i >= 0 && first + i < count) out[first + i] = pack.v[i];
    }
  }
}

template <class T, class Storage, class Dist>
void fill(Tensor& out, const RandomParams& p, int64_t streams, const int64_t* seed_offset, const Dist& distribution,
          cudaStream_t stream) {
  if (p.count == 0 || streams == 0) return;
  const bool scaled = p.distribution == Distribution::kNormal && !(p.a == 0.0 && p.b == 1.0);
  const bool clamp = p.distribution == Distribution::kUniform && !(p.a == 0.0 && p.b == 1.0);
  Storage below{};
  if (clamp) narrow(T(p.c), &below);
  const int64_t blocks = ceil_div(p.count, Work<T>::kPerBlock) + 1;  // one more for a lead
  const dim3 grid(unsigned(ceil_div(blocks, kThreads)), unsigned(streams));
  STD_TORCH_CHECK(streams < 65536, "seed_offset: expected fewer than 65536 streams on CUDA, got ", streams);
  launch(fill_kernel<T, Storage, Dist>, grid, kThreads, 0, stream, static_cast<Storage*>(out.mutable_data_ptr()),
         p.count, seed_offset, distribution, Affine<T>{T(p.a), T(p.b), scaled}, below, clamp);
}

template <class T, class Storage>
void fill_real(Tensor& out, const RandomParams& p, int64_t streams, const int64_t* seed_offset, int significand,
               cudaStream_t stream) {
  switch (p.distribution) {
    case Distribution::kUniform:
      return fill<T, Storage>(out, p, streams, seed_offset, Uniform<T>(p, significand), stream);
    case Distribution::kNormal: return fill<T, Storage>(out, p, streams, seed_offset, StandardNormal<T>(), stream);
    case Distribution::kExponential: return fill<T, Storage>(out, p, streams, seed_offset, Exponential<T>(p), stream);
    case Distribution::kBernoulli: return fill<float, Storage>(out, p, streams, seed_offset, Bernoulli(p), stream);
    case Distribution::kBits: break;
  }
  STD_TORCH_CHECK(false, "fastgen: no such distribution");
}

Tensor draw(const Tensor& seed_offset, const std::vector<int64_t>& size, ScalarType dtype, RandomParams p) {
  const OnDevice device(seed_offset);
  Tensor keep;
  const int64_t* pointer = seed_offset_pointer(seed_offset, keep);
  const int64_t streams = stream_count(seed_offset);
  Tensor out = torch::stable::new_empty(seed_offset, stacked_size(seed_offset, size), dtype);
  p.dtype = dtype_of(dtype);
  p.count = product(size);
  const cudaStream_t stream = current_stream(seed_offset);
  switch (p.dtype) {
    case DType::kInt32: fill<float, float>(out, p, streams, pointer, Bits<float>(), stream); break;
    case DType::kInt64: fill<double, double>(out, p, streams, pointer, Bits<double>(), stream); break;
    case DType::kBool: fill<float, bool>(out, p, streams, pointer, Bernoulli(p), stream); break;
    case DType::kFloat32: fill_real<float, float>(out, p, streams, pointer, 24, stream); break;
    case DType::kFloat64: fill_real<double, double>(out, p, streams, pointer, 53, stream); break;
    case DType::kBFloat16: fill_real<float, BFloat16>(out, p, streams, pointer, 8, stream); break;
    case DType::kFloat16: fill_real<float, Float16>(out, p, streams, pointer, 11, stream); break;
  }
  return out;
}

}  // namespace
}  // namespace fastgen

FASTGEN_CUDA_OPS(m) {
  using Ops = fastgen::RandomOps<&fastgen::draw>;
  m.impl("random_bits", TORCH_BOX(&Ops::random_bits));
  m.impl("uniform", TORCH_BOX(&Ops::uniform));
  m.impl("normal", TORCH_BOX(&Ops::normal));
  m.impl("exponential", TORCH_BOX(&Ops::exponential));
  m.impl("bernoulli", TORCH_BOX(&Ops::bernoulli));
}
