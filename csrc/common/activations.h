// Exponential and logistic functions, hyperbolic tangent and logarithm of vectors, for kernels that promise accuracy
// and not bits: multiply-adds are fused where the instruction set has them. Errors stay below 3 units in the last
// place; limits at infinity are exact, and a NaN passes, but for the logarithm, which is for positive normal numbers.
//
// F, U and what they must offer: see math.h, and multiply_add(a, b, c) = a b + c.
#pragma once

#include "math.h"

namespace fastgen {

// x = n ln 2 + r, |r| <= ln 2 / 2. The low bits of `shifted` hold n as an integer.
template <class T, class F>
FASTGEN_FN F reduce_by_ln2(F x, F& shifted, F& n) {
  using C = Constants<T>;
  shifted = multiply_add(x, F(C::kLog2E), F(C::kRound));
  n = shifted - F(C::kRound);
  return multiply_add(n, F(-C::kLn2Low), multiply_add(n, F(-C::kLn2High), x));
}

// x^N + the sum of c[i] x^i.
template <class F, int N>
FASTGEN_FN F horner_monic(F x, const float (&c)[N]) {
  F value = x + F(c[N - 1]);
  FASTGEN_UNROLL
  for (int i = N - 2; i >= 0; --i) value = multiply_add(value, x, F(c[i]));
  return value;
}

// exp(r) - 1 for a reduced r.
template <class T, class F>
FASTGEN_FN F exp_minus_1_reduced(F r) {
  return multiply_add(r * r, exp_tail<true>(r, T(0)), r);
}

// 2^x for x below 126 (1022 in double); what would be subnormal is zero.
template <class T, class U, class F>
FASTGEN_FN F power_of_2(F x) {
  using C = Constants<T>;
  constexpr int kBias = (1 << (C::kBits - C::kMantissa - 2)) - 1;
  const F low(T(2 - kBias));
  const F y = larger(low, x);  // a NaN in the second argument passes
  // The low bits of `shifted` hold the integer next to x, and the bias of the exponent.
  const F shifted = y + F(C::kRound + T(kBias));
  const F r = (y - (shifted - F(C::kRound + T(kBias)))) * F(T(0.69314718055994531));
  const F scale = real(bits(shifted) << C::kMantissa);
  return select(less(x, low), F(T(0)), multiply_add(exp_minus_1_reduced<T>(r), scale, scale));
}

// log(x) of a positive normal x.
template <class T, class U, class F>
FASTGEN_FN F logarithm(F x) {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  const U shifted = bits(x) - U(C::kSqrtHalf);
  const F m = real((shifted & U((Bits(1) << C::kMantissa) - 1)) + U(C::kSqrtHalf));
  const F exponent = signed_to_real(shift_right_signed<C::kMantissa>(shifted));
  return F(T(0)) - minus_log(F(T(0)) - exponent, m - F(T(1)), T(0));
}

// 1 / (1 + exp(-x))
template <class T, class U, class F>
FASTGEN_FN F sigmoid(F x) {
  using C = Constants<T>;
  F shifted, n;
  // A NaN in the second argument passes.
  const F r = reduce_by_ln2<T>(smaller(F(C::kExpHigh), larger(F(C::kExpLow), F(T(0)) - x)), shifted, n);
  const F e = times_power_of_2<T>(F(T(1)) + exp_minus_1_reduced<T>(r), n, bits(shifted) - bits(F(C::kRound)));
  return F(T(1)) / (F(T(1)) + e);
}

// Fits of 2^r, |r| <= 1/2, and of numerator / denominator = -exp(a^2 / 2) Phi(-a), 0 <= a <= 13.27, Phi being the
// distribution function of the normal distribution. Powers from 0 on; the denominator's highest coefficient is 1. Those
// for half types add a relative error below 2^-16, small beside the rounding of a result.
template <bool kHalf>
struct NormalTailFits {
  static constexpr float kPower[] = {1.0f,           0.693147182f,   0.240226507f,   0.0555035695f,
                                     0.00961808302f, 0.00133908633f, 0.000154531634f};
  static constexpr float kNumerator[] = {-13.9004269f, -9.49664116f, -3.00144601f, -0.398807675f};
  static constexpr float kDenominator[] = {27.8008537f, 41.1750565f, 24.9564056f, 7.51242733f};
};
template <>
struct NormalTailFits<true> {
  static constexpr float kPower[] = {1.0f, 0.693136752f, 0.2402253f, 0.0558382832f, 0.00965671055f};
  static constexpr float kNumerator[] = {-3.82256532f, -1.93717885f, -0.400348455f};
  static constexpr float kDenominator[] = {7.6451025f, 9.97547913f, 4.92924786f};
};

// What GELU needs of the normal distribution at x, in float32: with a = |x|, up to where Phi(-a) is so small that it
// counts as zero,
//   exp(-x^2 / 2) = power scale        -Phi(-a) = numerator / denominator power scale
// The smaller of the two sides of Phi is the one that is made, so small values keep their digits.
template <bool kHalf, class U, class F>
struct NormalTail {
  using Fits = NormalTailFits<kHalf>;
  F size, scale, power, numerator, denominator;

  FASTGEN_MEMBER explicit NormalTail(F x) {
    using C = Constants<float>;
    // At 13.27 the exponent is -127, whose `scale` has no bit set. A NaN in the second argument passes.
    size = smaller(F(13.27f), absolute(x));
    // -x^2 / 2 = (n + r) ln 2; the low bits of `shifted` hold n and the bias of the exponent.
    const F slope = size * F(-0.5f * C::kLog2E), round(C::kRound + 127.0f);
    const F shifted = multiply_add(size, slope, round);
    const F r = multiply_add(size, slope, round - shifted);
    scale = real(bits(shifted) << C::kMantissa);
    power = horner<true>(r, Fits::kPower);
    numerator = horner<true>(size, Fits::kNumerator);
    denominator = horner_monic(size, Fits::kDenominator);
  }
};

// With e = exp(-2 |x|), tanh |x| = (1 - e) / (1 + e), where 1 - e is made without cancellation, and past 1/2, where a
// unit in the last place of the result weighs in 1 - tanh^2, 1 - 2 e / (1 + e).
template <class T, class U, class F>
FASTGEN_FN F hyperbolic_tangent(F x) {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  constexpr Bits kBias = (Bits(1) << (C::kBits - C::kMantissa - 2)) - 1;
  F shifted, n;
  // Below -40, 1 - e is 1.
  const F r = reduce_by_ln2<T>(larger(F(T(-40)), F(T(-2)) * absolute(x)), shifted, n);
  // 2^n: the shift drops all but n and the bias.
  const F scale = real((bits(shifted) + (U(kBias) - bits(F(C::kRound)))) << C::kMantissa);
  const F p = exp_minus_1_reduced<T>(r);
  const F e = multiply_add(p, scale, scale), minus = multiply_add(p, F(T(0)) - scale, F(T(1)) - scale);
  const auto near = less(absolute(x), F(T(0.55)));
  const F ratio = select(near, minus, e + e) / (F(T(1)) + e);
  const F size = select(near, ratio, F(T(1)) - ratio);
  return real(bits(size) ^ (bits(x) & U(Bits(1) << (C::kBits - 1))));
}

}  // namespace fastgen
