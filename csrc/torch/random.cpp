// fastgen::claim, random_bits, uniform, normal, exponential, bernoulli on the CPU.
#include <cmath>
#include <limits>
#include <vector>

#include "../cpu/isa.h"
#include "memory.h"
#include "tensor.h"

namespace fastgen {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

// seed_offset (2,) -> size; (S, 2) -> (S, *size), one stream an entry.
Tensor draw(const Tensor& seed_offset, const std::vector<int64_t>& size, ScalarType dtype, RandomParams p) {
  check_seed_offset(seed_offset, 2);
  std::vector<int64_t> full = size;
  const bool several = seed_offset.dim() == 2;
  const int64_t streams = several ? seed_offset.size(0) : 1;
  if (several) full.insert(full.begin(), streams);
  Tensor out = torch::stable::empty(full, dtype);

  p.dtype = dtype_of(dtype);
  p.count = 1;
  for (int64_t extent : size) p.count *= extent;
  const int64_t* words = static_cast<const int64_t*>(seed_offset.const_data_ptr());
  const int64_t next_word = seed_offset.stride(seed_offset.dim() - 1);
  const int64_t next_stream = several ? seed_offset.stride(0) : 0;
  char* data = static_cast<char*>(out.mutable_data_ptr());
  prefer_huge_pages(data, size_t(out.numel()) * out.element_size());
  const auto fill = kernels().random;
  for (int64_t s = 0; s < streams; ++s) {
    p.seed = uint64_t(words[s * next_stream]);
    p.offset = uint64_t(words[s * next_stream + next_word]);
    p.out = data + s * p.count * int64_t(out.element_size());
    torch::stable::parallel_for(0, p.count, kGrain, [&](int64_t begin, int64_t end) { fill(p, begin, end); });
  }
  return out;
}

RandomParams params(Distribution distribution, double a = 0, double b = 0, double c = 0) {
  RandomParams p{};
  p.distribution = distribution;
  p.a = a;
  p.b = b;
  p.c = c;
  return p;
}

// The largest value of `dtype` under `high`.
double below(double high, ScalarType dtype) {
  const double infinity = std::numeric_limits<double>::infinity();
  if (dtype == ScalarType::Double) return std::nextafter(high, -infinity);
  if (dtype == ScalarType::Float) {
    const float rounded = float(high);
    return double(rounded) < high ? rounded : std::nextafterf(rounded, -std::numeric_limits<float>::infinity());
  }
  const auto next = [&](auto storage) {
    narrow(float(high), &storage);
    if (double(widen(storage)) < high) return double(widen(storage));
    // One step down in sign-magnitude order; below zero's two codes comes the smallest negative number.
    if ((storage.bits & 0x7fff) == 0) {
      storage.bits = 0x8001;
    } else {
      storage.bits = uint16_t(storage.bits & 0x8000 ? storage.bits + 1 : storage.bits - 1);
    }
    return double(widen(storage));
  };
  return dtype == ScalarType::BFloat16 ? next(BFloat16{}) : next(Float16{});
}

// The present (seed, offset) of a generator, which moves `count` elements on.
Tensor claim(Tensor state, int64_t count) {
  check_seed_offset(state, 1);
  Tensor taken = torch::stable::clone(state);
  int64_t* offset = static_cast<int64_t*>(state.mutable_data_ptr()) + state.stride(0);
  *offset = int64_t(uint64_t(*offset) + uint64_t(count));
  return taken;
}

Tensor random_bits(const Tensor& seed_offset, std::vector<int64_t> size, ScalarType dtype) {
  return draw(seed_offset, size, dtype, params(Distribution::kBits));
}

Tensor uniform(const Tensor& seed_offset, std::vector<int64_t> size, ScalarType dtype, double low, double high) {
  return draw(seed_offset, size, dtype, params(Distribution::kUniform, low, high - low, below(high, dtype)));
}

Tensor normal(const Tensor& seed_offset, std::vector<int64_t> size, ScalarType dtype, double mean, double std) {
  return draw(seed_offset, size, dtype, params(Distribution::kNormal, mean, std));
}

Tensor exponential(const Tensor& seed_offset, std::vector<int64_t> size, ScalarType dtype, double rate) {
  return draw(seed_offset, size, dtype, params(Distribution::kExponential, rate));
}

Tensor bernoulli(const Tensor& seed_offset, std::vector<int64_t> size, ScalarType dtype, double p) {
  return draw(seed_offset, size, dtype, params(Distribution::kBernoulli, std::nearbyint(p * 0x1p32)));
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("claim", TORCH_BOX(&fastgen::claim));
  m.impl("random_bits", TORCH_BOX(&fastgen::random_bits));
  m.impl("uniform", TORCH_BOX(&fastgen::uniform));
  m.impl("normal", TORCH_BOX(&fastgen::normal));
  m.impl("exponential", TORCH_BOX(&fastgen::exponential));
  m.impl("bernoulli", TORCH_BOX(&fastgen::bernoulli));
}
