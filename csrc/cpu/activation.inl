// GELU and SwiGLU with their derivatives, once over Isa (after a vec_*.h).
//
//   GELU(x)        x Phi(x), or x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) (Hendrycks & Gimpel, 2016), x = input +
//   bias SwiGLU(a, b)   a sigmoid(a) b (Shazeer, 2020)
//
// A pass over memory each way: what is in between stays in registers, and so does the gradient of the bias, but for a
// row of sums.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/activations.h"
#include "lanes.inl"

namespace fastgen {
namespace {

template <class Storage>
struct ExactGelu {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;

  // max(x, 0) - |x| Phi(-|x|); an infinity less itself is the NaN of the formula.
  static FASTGEN_MEMBER F value(F x) {
    if constexpr (sizeof(T) == sizeof(double)) {
      return x * distribution(x);
    } else {
      const NormalTail<(sizeof(Storage) < sizeof(float)), U, F> t(x);
      return multiply_add(t.size * t.numerator * t.power / t.denominator, t.scale, x - smaller(x, F(0.0f)));
    }
  }
  // Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
  static FASTGEN_MEMBER F slope(F x) {
    const F density(T(0.39894228040143268));
    if constexpr (sizeof(T) == sizeof(double)) {
      return multiply_add(x * power_of_2<T, U>(x * x * F(T(-0.5) * Constants<T>::kLog2E)), density, distribution(x));
    } else {
      const NormalTail<false, U, F> t(x);
      const F e = t.power * t.scale, above = t.numerator / t.denominator * e;
      return multiply_add(x * e, density, select(less(F(0.0f), x), F(1.0f) + above, F(0.0f) - above));
    }
  }

 private:
  // Phi(x) in double, digit for digit, and seldom asked for: lane by lane.
  static FASTGEN_MEMBER F distribution(F x) {
    T lanes[kLanes<T>];
    store(lanes, x);
    for (T& lane : lanes) lane = T(0.5) * std::erfc(lane * T(-0.70710678118654752));
    F out;
    load(lanes, out);
    return out;
  }
};

// s = sigmoid(x) and s (1 - s), from x log2(e); neither 1 - s nor s is what is left of 1.
template <class T>
struct Logistic {
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  F share, spread;

  FASTGEN_MEMBER explicit Logistic(F x) {
    const F e = power_of_2<T, U>(F(T(0)) - absolute(x)), larger_side = F(T(1)) / (F(T(1)) + e);
    const F smaller_side = e * larger_side;
    share = select(less(F(T(0)), x), larger_side, smaller_side);
    spread = larger_side * smaller_side;
  }
};

template <class T>
struct TanhGelu {
  using F = typename Work<T>::F;
  static constexpr T kLinear = T(1.5957691216057308), kCubic = kLinear * T(0.044715);  // 2 sqrt(2 / pi)
  static constexpr T kLog2E = Constants<T>::kLog2E;

  static FASTGEN_MEMBER Logistic<T> logistic(F x) {
    return Logistic<T>(x * multiply_add(x * x, F(kCubic * kLog2E), F(kLinear * kLog2E)));
  }
  static FASTGEN_MEMBER F value(F x) { return x * logistic(x).share; }
  static FASTGEN_MEMBER F slope(F x) {
    const Logistic<T> l = logistic(x);
    return multiply_add(l.spread, x * multiply_add(x * x, F(3 * kCubic), F(kLinear)), l.share);
  }
};

template <class Storage>
class ActivationRows {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  static constexpr int kWidth = kLanes<T>;

 public:
  explicit ActivationRows(const ActivationParams& params) : p(params) {}

  void forward(int64_t begin, int64_t end) const {
    Storage* const out = static_cast<Storage*>(p.out);
    const Biased biased(p);
    switch (p.activation) {
      case Activation::kGelu:
        return for_vectors(begin, end, [=](int64_t at, int64_t j, auto count) {
          put(out + at, ExactGelu<Storage>::value(biased(at, j, count)), count);
        });
      case Activation::kGeluTanh:
        return for_vectors(begin, end, [=](int64_t at, int64_t j, auto count) {
          put(out + at, TanhGelu<T>::value(biased(at, j, count)), count);
        });
      case Activation::kSwiglu: {
        const Storage* const gates = biased.input;
        const Storage* const ups = gates + p.width;
        return for_vectors(begin, end, [=](int64_t at, int64_t j, auto count) {
          const F gate = take<F>(gates + 2 * at - j, count), up = take<F>(ups + 2 * at - j, count);
          put(out + at, gate * logistic(gate).share * up, count);
        });
      }
    }
  }

  // Blocks of rows.
  void backward(const ActivationBackwardParams& g, int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kActivationRows;
      const int64_t last = first + kActivationRows < p.rows ? first + kActivationRows : p.rows;
      switch (p.activation) {
        case Activation::kGelu: gelu_backward<ExactGelu<Storage>>(g, block, first, last); break;
        case Activation::kGeluTanh: gelu_backward<TanhGelu<T>>(g, block, first, last); break;
        case Activation::kSwiglu: swiglu_backward(g, first, last); break;
      }
    }
  }

  // Columns of the gradient of the bias.
  void add_blocks(const ActivationBackwardParams& g, int64_t begin, int64_t end) const {
    const int64_t blocks = (p.rows + kActivationRows - 1) / kActivationRows;
    with_storage(p.bias_dtype, [&](auto number) {
      using Bias = decltype(number);
      if constexpr (sizeof(typename WorkType<Bias>::T) == sizeof(T)) {
        for (int64_t j = begin; j < end; j += kWidth) {
          const int count = end - j < kWidth ? int(end - j) : kWidth;
          F total(T(0));
          for (int64_t b = 0; b < blocks; ++b) {
            total = total + take<F>(static_cast<const T*>(g.sums) + b * p.width + j, count);
          }
          put(static_cast<Bias*>(g.grad_bias) + j, total, count);
        }
      }
    });
  }

 private:
  // input + bias.
  struct Biased {
    const Storage* input;
    const Storage* bias;
    const T* wide_bias;  // that of half types in float32

    explicit Biased(const ActivationParams& p) : input(static_cast<const Storage*>(p.input)) {
      const bool own = p.bias_dtype == p.dtype;
      bias = own ? static_cast<const Storage*>(p.bias) : nullptr;
      wide_bias = own ? nullptr : static_cast<const T*>(p.bias);
    }
    FASTGEN_MEMBER F operator()(int64_t at, int64_t j, int count) const {
      const F x = take<F>(input + at, count);
      if (bias != nullptr) return x + take<F>(bias + j, count);
      if (wide_bias != nullptr) return x + take<F>(wide_bias + j, count);
      return x;
    }
  };

  // Calls body(place in out, column, lanes) for the vectors of these rows. The lanes are a constant of all but the last
  // vector of a row. What body captures it captures by value: a store could change anything behind a reference.
  template <class Body>
  FASTGEN_MEMBER void for_vectors(int64_t begin, int64_t end, const Body& body) const {
    const int64_t width = p.width;
    for (int64_t row = begin; row < end; ++row) {
      int64_t j = 0;
      for (; j + kWidth <= width; j += kWidth) body(row * width + j, j, std::integral_constant<int, kWidth>());
      if (j < width) body(row * width + j, j, int(width - j));
    }
  }

  template <class Function>
  void gelu_backward(const ActivationBackwardParams& g, int64_t block, int64_t first, int64_t last) const {
    const Storage* const grad = static_cast<const Storage*>(g.grad);
    Storage* const out = static_cast<Storage*>(g.grad_input);
    T* const sums = g.sums == nullptr ? nullptr : static_cast<T*>(g.sums) + block * p.width;
    for (int64_t j = 0; j < p.width && sums != nullptr; ++j) sums[j] = T(0);
    const Biased biased(p);
    for_vectors(first, last, [=](int64_t at, int64_t j, auto count) {
      const F d = take<F>(grad + at, count) * Function::slope(biased(at, j, count));
      put(out + at, d, count);
      if (sums != nullptr) put(sums + j, take<F>(sums + j, count) + d, count);
    });
  }

  void swiglu_backward(const ActivationBackwardParams& g, int64_t first, int64_t last) const {
    const Storage* const grad = static_cast<const Storage*>(g.grad);
    const Storage* const gates = static_cast<const Storage*>(p.input);
    Storage* const out = static_cast<Storage*>(g.grad_input);
    const int64_t width = p.width;
    for_vectors(first, last, [=](int64_t at, int64_t j, auto count) {
      const int64_t of_gate = 2 * at - j, of_up = of_gate + width;
      const F gate = take<F>(gates + of_gate, count), up = take<F>(gates + of_up, count);
      const F d = take<F>(grad + at, count);
      const Logistic<T> l = logistic(gate);
      put(out + of_gate, d * up * multiply_add(gate, l.spread, l.share), count);
      put(out + of_up, d * gate * l.share, count);
    });
  }

  static FASTGEN_MEMBER Logistic<T> logistic(F x) { return Logistic<T>(x * F(Constants<T>::kLog2E)); }

  const ActivationParams& p;
};

}  // namespace
}  // namespace fastgen
