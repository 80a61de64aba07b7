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

// Phi(x), the distribution function of the normal distribution, from e = exp(-x^2 / 2): of the smaller of the two sides
// Mills' ratio times e, so that small values keep their digits.
template <class F>
FASTGEN_FN F normal_distribution(F x, F e, float) {
  constexpr float c[] = {0.143622577f,  0.14359051f,   0.124706186f, 0.0931821913f, 0.00653395616f,
                         0.0971646905f, -0.214618355f, 0.13517642f,  -0.0293582119f};
  const F t = F(1.0f) / multiply_add(absolute(x), F(0.36f), F(1.0f));
  const F smaller_side = e * (t * horner<true>(t, c));
  return select(less(F(0.0f), x), F(1.0f) - smaller_side, smaller_side);
}

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
