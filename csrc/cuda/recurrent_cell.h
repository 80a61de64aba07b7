// What the threads of a step do with single units: activations, zoneout, and the statistics of layer norm, which are
// those of a row of the batch and come together from all blocks.
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
__device__ inline float tanh_of(float x) {
  return hyperbolic_tangent<float, Lanes<uint32_t, 1>>(Lanes<float, 1>(x)).v[0];
}

// The element of an operand that need not be there, as it stands in memory and as a number.
template <class Element>
__device__ Element element_of(const void* data, int64_t at) {
  return data == nullptr ? Element{} : static_cast<const Element*>(data)[at];
}
template <class Element>
__device__ float value_of(const void* data, int64_t at, float none = 0.0f) {
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
