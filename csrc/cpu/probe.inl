// What a core can do at best, for the bounds of the benchmarks (after product.inl): arithmetic without memory, and
// reads without more arithmetic than it takes to have read.
#pragma once

#include "product.inl"

namespace fastgen {
namespace {

// All lanes added up, so that no compiler drops what made them.
template <class T, class F>
double total(F value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  double sum = 0;
  for (const T lane : lanes) sum += double(lane);
  return sum;
}

// `count` multiply-adds of the arithmetic A (product.inl) or a few more, in as many independent chains as a product
// has.
template <class A>
double multiply_adds(int64_t count) {
  using T = typename A::T;
  using F = typename A::F;
  F sum[Isa::kSums];
  FASTGEN_UNROLL
  for (int i = 0; i < Isa::kSums; ++i) sum[i] = F(T(i));
  const F left(T(1e-3)), right(T(1e-6));
  for (int64_t done = 0; done < count; done += Isa::kSums * kLanes<T> * A::kDepth) {
    FASTGEN_UNROLL
    for (int i = 0; i < Isa::kSums; ++i) sum[i] = A::step(left, right, sum[i]);
  }
  FASTGEN_UNROLL
  for (int i = 1; i < Isa::kSums; ++i) sum[0] = sum[0] + sum[i];
  return total<T>(sum[0]);
}

// `count` floats from `from`, read `times` times over. Less than one turn of the loop at the end is left out.
double reads(const float* from, int64_t count, int64_t times) {
  using F = Work<float>::F;
  constexpr int kChains = 8, kWidth = kLanes<float>;
  F sum[kChains];
  FASTGEN_UNROLL
  for (int i = 0; i < kChains; ++i) sum[i] = F(0.0f);
  for (int64_t t = 0; t < times; ++t) {
    for (int64_t k = 0; k + kChains * kWidth <= count; k += kChains * kWidth) {
      FASTGEN_UNROLL
      for (int i = 0; i < kChains; ++i) {
        F value;
        load(from + k + i * kWidth, value);
        sum[i] = sum[i] + value;
      }
    }
  }
  FASTGEN_UNROLL
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  return total<float>(sum[0]);
}

constexpr Probes kProbes = {multiply_adds<Multiply<float>>, multiply_adds<Multiply<double>>,
                            multiply_adds<Multiply<float>>, reads};

}  // namespace
}  // namespace fastgen
