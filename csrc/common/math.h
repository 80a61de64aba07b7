// Elementary functions with the same bits on every CPU and GPU: single IEEE operations in a fixed order,
// no fused multiply-add (compile with contraction off). `fastgen/reference/random.py` states the same algebra in
// PyTorch; `scripts/fit_polynomials.py` makes the coefficients.
//
// F is a float (double) or a vector of them, U the unsigned integers of the same width and lane count.
// Needed of them: + - * / on F, + - ^ & | << >> on U, and the free functions
//   negative(U) -> mask of lanes whose top bit is set    less(F, F) -> mask    select(mask, yes, no)
//   bits(F) -> U    real(U) -> F (same bits)    signed_to_real(U) -> F    shift_right_signed<n>(U)
//   times_power_of_2<T>(F x, F n, U n) -> x 2^n    root(F)    absolute(F)    smaller(F, F), larger(F, F): the second
//   argument if either is NaN
#pragma once

#include "platform.h"

namespace fastgen {

// kFused: each step is one multiply_add, for what promises accuracy and not bits (see activations.h).
template <bool kFused = false, class F, int N, class T>
FASTGEN_FN F horner(F x, const T (&c)[N]) {
  F value(c[N - 1]);
  FASTGEN_UNROLL
  for (int i = N - 2; i >= 0; --i) {
    if constexpr (kFused) {
      value = multiply_add(value, x, F(c[i]));
    } else {
      value = value * x + F(c[i]);
    }
  }
  return value;
}

// What differs between the precisions; T is float or double.
template <class T>
struct Constants;

template <>
struct Constants<float> {
  using Bits = uint32_t;
  static constexpr int kBits = 32, kMantissa = 23;
  static constexpr Bits kSqrtHalf = 0x3F3504F3u;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kScale = 0x1p-32f, kHalfStep = 0x1p-33f;
  static constexpr float kHalfPiScaled = float(1.5707963267948966 * 0x1p-32);
  // exp: the clamps lie where the result is surely infinite or zero; 1.5 * 2^23 rounds to an integer.
  static constexpr float kExpLow = -110.0f, kExpHigh = 100.0f, kLog2E = 1.4426950408889634f, kRound = 12582912.0f;
};

template <>
struct Constants<double> {
  using Bits = uint64_t;
  static constexpr int kBits = 64, kMantissa = 52;
  static constexpr Bits kSqrtHalf = 0x3FE6A09E667F3BCDull;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kScale = 0x1p-64, kHalfStep = 0x1p-65;
  static constexpr double kHalfPiScaled = 1.5707963267948966 * 0x1p-64;
  static constexpr double kExpLow = -760.0, kExpHigh = 720.0, kLog2E = 1.4426950408889634, kRound = 6755399441055744.0;
};

// (log1p(f) - f) / f^2
template <class F>
FASTGEN_FN F log_tail(F f, float) {
  constexpr float c[] = {-0.49999997f, 0.333333313f, -0.250007808f, 0.200012341f,  -0.166266456f,
                         0.142048553f, -0.13127555f, 0.127226725f,  -0.0767364129f};
  return horner(f, c);
}

// (2 atanh(s) / s - 2) / z, z = s^2
template <class F>
FASTGEN_FN F atanh_tail(F z, double) {
  constexpr double c[] = {0.6666666666666666,  0.4000000000000088,  0.28571428570803614, 0.22222222391713917,
                          0.18181795640132906, 0.15386239702814658, 0.13268773138656886, 0.13086626147840102};
  return horner(z, c);
}

// sin(r) / r, y = r^2
template <class F>
FASTGEN_FN F sine_ratio(F y, float) {
  constexpr float c[] = {1.0f, -0.166666642f, 0.00833274797f, -0.000195878907f};
  return horner(y, c);
}
template <class F>
FASTGEN_FN F sine_ratio(F y, double) {
  constexpr double c[] = {1.0,
                          -0.16666666666666666,
                          0.008333333333330948,
                          -0.00019841269836758574,
                          2.755731610255244e-06,
                          -2.5051131845003624e-08,
                          1.5918129294866608e-10};
  return horner(y, c);
}

// cos(r), y = r^2
template <class F>
FASTGEN_FN F cosine_of(F y, float) {
  constexpr float c[] = {1.0f, -0.5f, 0.0416666642f, -0.00138883025f, 2.45479423e-05f};
  return horner(y, c);
}
template <class F>
FASTGEN_FN F cosine_of(F y, double) {
  constexpr double c[] = {1.0,
                          -0.5,
                          0.041666666666666664,
                          -0.0013888888888887398,
                          2.480158729876569e-05,
                          -2.7557317271729793e-07,
                          2.08761462684032e-09,
                          -1.1382632425521717e-11};
  return horner(y, c);
}

// (exp(r) - 1 - r) / r^2
template <bool kFused = false, class F>
FASTGEN_FN F exp_tail(F r, float) {
  constexpr float c[] = {0.5f, 0.166665778f, 0.0416665561f, 0.00836317334f, 0.00139261759f};
  return horner<kFused>(r, c);
}
template <bool kFused = false, class F>
FASTGEN_FN F exp_tail(F r, double) {
  constexpr double c[] = {0.5,
                          0.1666666666666667,
                          0.04166666666666667,
                          0.008333333333326141,
                          0.0013888888888883752,
                          0.00019841269874800493,
                          2.4801587325533363e-05,
                          2.7557255425746435e-06,
                          2.7557273661348637e-07,
                          2.510520637395701e-08,
                          2.0914679376583935e-09};
  return horner<kFused>(r, c);
}

// k ln 2 - log1p(f)
template <class F>
FASTGEN_FN F minus_log(F k, F f, float) {
  return k * F(0.69314718056f) - (f + f * f * log_tail(f, 0.0f));
}
template <class F>
FASTGEN_FN F minus_log(F k, F f, double) {
  using C = Constants<double>;
  const F s = f / (F(2.0) + f);
  const F z = s * s;
  const F half_square = F(0.5) * (f * f);
  const F y = s * (half_square + z * atanh_tail(z, 0.0)) - k * F(C::kLn2Low);
  return k * F(C::kLn2High) - (f - (half_square - y));
}

// -log(1 - U), U = (x + 1/2) / 2^bits, accurate in both tails (see fastgen/reference/random.py).
template <class T, class F, class U>
FASTGEN_FN F standard_exponential(U x) {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  const auto large = negative(x);
  const U w = x ^ shift_right_signed<C::kBits - 1>(x);  // min(x, ~x)
  const F v = signed_to_real(w) * F(C::kScale) + F(C::kHalfStep);

  const U shifted = bits(v) - U(C::kSqrtHalf);
  const F m = real((shifted & U((Bits(1) << C::kMantissa) - 1)) + U(C::kSqrtHalf));
  const auto near = less(v, F(T(0.29289323)));
  const F f = select(large, m - F(T(1)), select(near, F(T(0)) - v, F(T(1)) - F(T(2)) * v));
  const F exponent = signed_to_real(shift_right_signed<C::kMantissa>(shifted));
  const F k = select(large, F(T(0)) - exponent, select(near, F(T(0)), F(T(1))));
  return minus_log(k, f, T(0));
}

// cos and sin of 2 pi x / 2^bits.
template <class T, class F, class U>
FASTGEN_FN void cos_sin_turn(U x, F& cosine, F& sine) {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  constexpr int kTop = C::kBits - 1;
  // The nearest quadrant stands in the two top bits of x + 1/8 turn.
  const U turned = x + U(Bits(1) << (kTop - 2));
  const F r = signed_to_real(x << 2) * F(C::kHalfPiScaled);
  const F y = r * r;
  const F s = r * sine_ratio(y, T(0)), c = cosine_of(y, T(0));
  const auto swap = negative(turned << 1);
  // The sign bit: set in quadrants 1, 2 for the cosine and 2, 3 for the sine.
  const U sign(Bits(1) << kTop);
  cosine = real(bits(select(swap, s, c)) ^ ((turned + U(Bits(1) << (kTop - 1))) & sign));
  sine = real(bits(select(swap, c, s)) ^ (turned & sign));
}

// Box-Muller: two standard normals of two words.
template <class T, class F, class U>
FASTGEN_FN void normal_pair(U radius_word, U angle_word, F& even, F& odd) {
  const F e = standard_exponential<T, F>(radius_word);
  const F radius = root(e + e);
  F c, s;
  cos_sin_turn<T>(angle_word, c, s);
  even = radius * c;
  odd = radius * s;
}

// x 2^n for an integer n, as a real and as a signed integer, with one rounding: in two factors, so that
// neither overflows and only the second product can be subnormal.
template <class T, class F, class U>
FASTGEN_FN F times_power_of_2_by_halves(F x, U n) {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  const U half = shift_right_signed<1>(n);
  const U bias(Bits((Bits(1) << (C::kBits - C::kMantissa - 2)) - 1));
  return x * real((half + bias) << C::kMantissa) * real((n - half + bias) << C::kMantissa);
}

// What sampling needs of a log-variance x, of one reduction x / 2 = n ln 2 + r. With q = exp(r) - 1 = r + u:
//   exp(x / 2) = 2^n (1 + q)        exp(x) = 2^2n (1 + (2 q + q^2))
// and where n = 0, so that nothing cancels, exp(x) - 1 = 2 q + q^2 and exp(x) - 1 - x = 2 u + q^2.
template <class F>
struct Exponentials {
  F of_half, minus_1, minus_1_minus;
};
template <class T, class U, class F>
FASTGEN_FN Exponentials<F> exponentials(F x) {
  using C = Constants<T>;
  const F half = smaller(F(C::kExpHigh), larger(F(C::kExpLow), F(T(0.5)) * x));  // a NaN in the second argument passes
  const F shifted = half * F(C::kLog2E) + F(C::kRound);
  const F n = shifted - F(C::kRound);
  const U exponent = bits(shifted) - bits(F(C::kRound));
  const F r = (half - n * F(C::kLn2High)) - n * F(C::kLn2Low);
  const F u = r * r * exp_tail(r, T(0));
  const F q = r + u, square = q * q, rest = q + q + square;
  // Not by 2 n at once: that is out of the range of exponents where the result is 0 or infinite.
  const F away = times_power_of_2<T>(times_power_of_2<T>(F(T(1)) + rest, n, exponent), n, exponent) - F(T(1));
  const auto near = less(absolute(n), F(T(0.5)));
  return {times_power_of_2<T>(F(T(1)) + q, n, exponent), select(near, rest, away),
          select(near, u + u + square, away - x)};
}

}  // namespace fastgen
