// The random ops of any device: from their arguments to RandomParams.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "tensor.h"

namespace fastgen {

inline RandomParams params(Distribution distribution, double a = 0, double b = 0, double c = 0) {
  RandomParams p{};
  p.distribution = distribution;
  p.a = a;
  p.b = b;
  p.c = c;
  return p;
}

// The largest value of `dtype` under `high`.
inline double below(double high, ScalarType dtype) {
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

// seed_offset (2,) -> size; (S, 2) -> (S, *size), one stream an entry.
inline int64_t stream_count(const Tensor& seed_offset) {
  check_seed_offset(seed_offset, 2);
  return seed_offset.dim() == 2 ? seed_offset.size(0) : 1;
}
inline std::vector<int64_t> stacked_size(const Tensor& seed_offset, std::vector<int64_t> size) {
  if (seed_offset.dim() == 2) size.insert(size.begin(), seed_offset.size(0));
  return size;
}
inline int64_t product(const std::vector<int64_t>& size) {
  int64_t count = 1;
  for (int64_t extent : size) count *= extent;
  return count;
}

// The ops over a function Tensor draw(seed_offset, size, dtype, RandomParams) of one device.
template <auto kDraw>
struct RandomOps {
  using Size = std::vector<int64_t>;

  static Tensor random_bits(const Tensor& seed_offset, Size size, ScalarType dtype) {
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "dtype: expected int32 or int64");
    return kDraw(seed_offset, size, dtype, params(Distribution::kBits));
  }
  static Tensor uniform(const Tensor& seed_offset, Size size, ScalarType dtype, double low, double high) {
    check_floating(dtype);
    return kDraw(seed_offset, size, dtype, params(Distribution::kUniform, low, high - low, below(high, dtype)));
  }
  static Tensor normal(const Tensor& seed_offset, Size size, ScalarType dtype, double mean, double std) {
    check_floating(dtype);
    return kDraw(seed_offset, size, dtype, params(Distribution::kNormal, mean, std));
  }
  static Tensor exponential(const Tensor& seed_offset, Size size, ScalarType dtype, double rate) {
    check_floating(dtype);
    return kDraw(seed_offset, size, dtype, params(Distribution::kExponential, rate));
  }
  static Tensor bernoulli(const Tensor& seed_offset, Size size, ScalarType dtype, double p) {
    if (dtype != ScalarType::Bool) check_floating(dtype);
    return kDraw(seed_offset, size, dtype, params(Distribution::kBernoulli, std::nearbyint(p * 0x1p32)));
  }
};

}  // namespace fastgen
