// What the threads of a step do with single units: the cell and its gradients, zoneout, and the statistics of layer
// norm, which are those of a row of the batch and come together from all blocks.
#pragma once

#define FASTGEN_GENERIC_BLOCKS 1
#include "../cpu/vec_generic.h"
// After vec_generic.h, which defines Isa:
#include "../common/activations.h"
#include "../common/params.h"
#include "../common/philox.h"
#include "recurrent_product.h"

namespace fastgen {
namespace {

__device__ inline float sigmoid_of(float x) { return sigmoid<float, Lanes<uint32_t, 1>>(Lanes<float, 1>(x)).v[0]; }
__device__ inline double sigmoid_of(double x) { return sigmoid<double, Lanes<uint64_t, 1>>(Lanes<double, 1>(x)).v[0]; }
__device__ inline float tanh_of(float x) {
  return hyperbolic_tangent<float, Lanes<uint32_t, 1>>(Lanes<float, 1>(x)).v[0];
}
__device__ inline double tanh_of(double x) {
  return hyperbolic_tangent<double, Lanes<uint64_t, 1>>(Lanes<double, 1>(x)).v[0];
}

template <class Body>
void by_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
    default: return body(float{});
  }
}
template <class Body>
void by_gates(CellMode mode, const Body& body) {
  switch (gate_count(mode)) {
    case 4: return body(std::integral_constant<int, 4>{});
    case 3: return body(std::integral_constant<int, 3>{});
    default: return body(std::integral_constant<int, 1>{});
  }
}

// What a cell makes of its sums in one unit. gates: what its backward pass reads, if it has any. T: float or double.
template <class T>
struct CellOf {
  T gates[4];
  T c, h;
};
using Cell = CellOf<float>;

// x, s: W_ih x + b_ih and W_hh h + b_hh; before: c, or of a GRU h.
template <int kGates, class T>
__device__ inline CellOf<T> cell_of(CellMode mode, const T (&x)[kGates], const T (&s)[kGates], T before) {
  if constexpr (kGates == 4) {
    const T i = sigmoid_of(x[0] + s[0]), f = sigmoid_of(x[1] + s[1]), g = tanh_of(x[2] + s[2]),
            o = sigmoid_of(x[3] + s[3]), c = f * before + i * g;
    return {{i, f, g, o}, c, o * tanh_of(c)};
  } else if constexpr (kGates == 3) {
    const T r = sigmoid_of(x[0] + s[0]), z = sigmoid_of(x[1] + s[1]), n = tanh_of(x[2] + r * s[2]);
    return {{r, z, n, s[2]}, T(0), (T(1) - z) * n + z * before};
  } else {
    const T sum = x[0] + s[0];
    // Not a maximum, which would drop a NaN.
    return {{}, T(0), mode == CellMode::kTanh ? tanh_of(sum) : sum < T(0) ? T(0) : sum};
  }
}

// The gradients of the sums. dc: all of that of c'; t: tanh(c').
template <class T>
struct LstmGradients {
  T sums[4];
  __device__ LstmGradients(const T (&gates)[4], T c_before, T t, T dh, T dc) {
    const auto [i, f, g, o] = gates;
    sums[0] = dc * g * i * (T(1) - i);
    sums[1] = dc * c_before * f * (T(1) - f);
    sums[2] = dc * i * (T(1) - g * g);
    sums[3] = dh * t * o * (T(1) - o);
  }
};
template <class T>
struct GruGradients {
  T from_input[3], from_state[3];
  __device__ GruGradients(const T (&gates)[4], T h_before, T dh) {
    const auto [r, z, n, h_n] = gates;
    from_input[2] = dh * (T(1) - z) * (T(1) - n * n);
    from_input[1] = from_state[1] = dh * (h_before - n) * z * (T(1) - z);
    from_input[0] = from_state[0] = from_input[2] * h_n * r * (T(1) - r);
    from_state[2] = from_input[2] * r;
  }
};
template <class T>
__device__ inline T elman_gradient(CellMode mode, T h, T dh) {
  return mode == CellMode::kTanh ? dh * (T(1) - h * h) : h > T(0) ? dh : T(0);
}

// The element of an operand that need not be there, as it stands in memory and as a number.
template <class Element>
__device__ Element element_of(const void* data, int64_t at) {
  return data == nullptr ? Element{} : static_cast<const Element*>(data)[at];
}
template <class Element>
__device__ auto value_of(const void* data, int64_t at, typename WorkType<Element>::T none = 0) {
  return data == nullptr ? none : widen(static_cast<const Element*>(data)[at]);
}

// d of zoneout (csrc/common/params.h): a share, or drawn from the stream.
struct Zone {
  bool used;
  float share;
  uint64_t threshold, first;  // drawn: kept where the word of element first + i is below the threshold
};

__device__ inline float zone_at(const Zone& zone, const int64_t* seed_offset, uint64_t i) {
  if (seed_offset == nullptr) return zone.share;
  const uint64_t element = uint64_t(seed_offset[1]) + zone.first + i, counter = element / 4 & ~0ull >> 2;
  uint64_t c0[] = {counter}, c1[] = {counter >> 32}, c2[] = {0}, c3[] = {kWidth32};
  philox4x32_10(c0, c1, c2, c3, PhiloxKey(uint64_t(seed_offset[0])));
  const uint64_t word = element % 4 == 0 ? c0[0] : element % 4 == 1 ? c1[0] : element % 4 == 2 ? c2[0] : c3[0];
  return uint32_t(word) < zone.threshold ? 1.0f : 0.0f;
}

// Sums over the eight threads that have the units of a tile in one row; the whole warp calls.
__device__ inline float sum_of_units(float x) {
  x = x + shuffle_xor(x, 1);
  x = x + shuffle_xor(x, 2);
  return x + shuffle_xor(x, 4);
}

template <class T>
__device__ T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x = x + shuffle_xor(x, step);
  return x;
}

// The mean of some of the values of a row, and the sum of their squared distances from it (Chan, Golub & LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979). Each tile leaves its own, and
// all blocks put those of a row together in the same order.
template <int kValues>
__device__ float2 moments_of_tile(const float (&values)[kValues], int units, bool valid) {
  const float count = float(kValues * units);
  float sum = 0, squares = 0;
  for (int i = 0; valid && i < kValues; ++i) sum = sum + values[i];
  const float mean = sum_of_units(sum) / count;
  for (int i = 0; valid && i < kValues; ++i) squares = (values[i] - mean) * (values[i] - mean) + squares;
  return {mean, sum_of_units(squares)};
}

// Of `values` values a unit: the mean and the variance.
__device__ inline float2 moments_of_row(const float2* tiles, int count, int64_t units, int values) {
  const int lane = threadIdx.x % kUnits;
  const auto size = [&](int i) {
    const int64_t left = units - int64_t(i) * kUnits;
    return float(values) * float(left < kUnits ? left : kUnits);
  };
  const float total = float(values) * float(units);
  float sum = 0, squares = 0;
  for (int i = lane; i < count; i += kUnits) sum = size(i) * tiles[i].x + sum;
  const float mean = sum_of_units(sum) / total;
  for (int i = lane; i < count; i += kUnits) {
    const float away = tiles[i].x - mean;
    squares = squares + tiles[i].y + size(i) * away * away;
  }
  return {mean, sum_of_units(squares) / total};
}

// The sums of two things over a row, from those of its tiles.
__device__ inline float2 sums_of_row(const float2* tiles, int count) {
  float2 sum = {0, 0};
  for (int i = threadIdx.x % kUnits; i < count; i += kUnits) {
    sum.x = sum.x + tiles[i].x;
    sum.y = sum.y + tiles[i].y;
  }
  return {sum_of_units(sum.x), sum_of_units(sum.y)};
}

}  // namespace
}  // namespace fastgen
