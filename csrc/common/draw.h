// The arithmetic between the scores of a row and its next token, for every device: fastgen/reference/generate.py,
// pick_tokens. Single IEEE operations in double precision, then integers, so that all have the same token.
#pragma once

#include "params.h"
#include "philox.h"

namespace fastgen {
namespace {

constexpr int kUnitBits = 40;           // weights are in units of 2^-40 of the largest
constexpr double kSmallestScore = -28;  // exp of less is under one unit

// exp(x) 2^40 for x <= 0, rounded down: x = k ln 2 + r, and exp(r) by its Taylor series.
FASTGEN_FN int64_t probability_units(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: what is added to it is rounded to an integer
  constexpr double kInverseFactorial[] = {1.0,
                                          1.0 / 1.0,
                                          1.0 / 2.0,
                                          1.0 / 6.0,
                                          1.0 / 24.0,
                                          1.0 / 120.0,
                                          1.0 / 720.0,
                                          1.0 / 5040.0,
                                          1.0 / 40320.0,
                                          1.0 / 362880.0,
                                          1.0 / 3628800.0,
                                          1.0 / 39916800.0,
                                          1.0 / 479001600.0,
                                          1.0 / 6227020800.0};
  const bool large = x >= kSmallestScore;
  x = large ? x : 0.0;
  const double k = (x * 1.4426950408889634 + kRound) - kRound;
  const double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  double value = kInverseFactorial[13];
  FASTGEN_UNROLL
  for (int n = 12; n >= 0; --n) value = value * r + kInverseFactorial[n];
  const uint64_t exponent = uint64_t(int64_t(k) + 1023 + kUnitBits) << 52;
  double power;
  memcpy(&power, &exponent, sizeof power);
  return large ? int64_t(value * power) : 0;
}

// What a token is drawn by. temperature: not 0.
FASTGEN_FN double score_of(double logit, bool seen, double temperature, double penalty) {
  return (seen ? (logit < 0 ? logit * penalty : logit / penalty) : logit) / temperature;
}

// The float64 uniform number of an element of a stream.
FASTGEN_FN double uniform_at(uint64_t seed, uint64_t element) {
  const uint64_t block = element >> 1;
  uint64_t c0[] = {uint32_t(block)}, c1[] = {block >> 32}, c2[] = {0}, c3[] = {kWidth64};
  philox4x32_10(c0, c1, c2, c3, PhiloxKey(seed));
  const uint64_t low = element & 1 ? c2[0] : c0[0], high = element & 1 ? c3[0] : c1[0];
  return double((uint64_t(uint32_t(low)) | high << 32) >> 11) * 0x1p-53;
}

}  // namespace
}  // namespace fastgen
