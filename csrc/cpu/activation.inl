// GELU and SwiGLU with their derivatives, once over Isa (after a vec_*.h).
//
//   GELU(x)        x Phi(x), or x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) (Hendrycks & Gimpel, 2016), x = input +
//   bias SwiGLU(a, b)   a sigmoid(a) b (Shazeer, 2020)
//
// A pass over memory each way: what is in between stays in registers, and so does the gradient of the bias, but for a
// row of sums.
#pragma once

#include <cmath>

#include "../common/activations.h"
#include "lanes.inl"

namespace fastgen {
namespace {

template <class T>
struct ExactGelu {
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;

  static FASTGEN_MEMBER F density_exponential(F x) {  // exp(-x^2 / 2)
    return power_of_2<T, U>(x * x * F(T(-0.5) * Constants<T>::kLog2E));
  }
  static FASTGEN_MEMBER F distribution(F x, F e) {
    if constexpr (sizeof(T) == sizeof(float)) {
      return normal_distribution(x, e, T(0));
    } else {  // digit for digit, and seldom asked for: lane by lane
      T lanes[kLanes<T>];
      store(lanes, x);
      for (T& lane : lanes) lane = T(0.5) * std::erfc(lane * T(-0.70710678118654752));
      F out;
      load(lanes, out);
      return out;
    }
  }
  static FASTGEN_MEMBER F value(F x) { return x * distribution(x, density_exponential(x)); }
  static FASTGEN_MEMBER F slope(F x) {
    const F e = density_exponential(x);
    return multiply_add(x * e, F(T(0.39894228040143268)), distribution(x, e));
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
    Storage* out = static_cast<Storage*>(p.out);
    switch (p.activation) {
      case Activation::kGelu:
        return for_vectors(begin, end, [&](int64_t at, int64_t j, int count) {
          put(out + at, ExactGelu<T>::value(biased(at, j, count)), count);
        });
      case Activation::kGeluTanh:
        return for_vectors(begin, end, [&](int64_t at, int64_t j, int count) {
          put(out + at, TanhGelu<T>::value(biased(at, j, count)), count);
        });
      case Activation::kSwiglu:
        return for_vectors(begin, end, [&](int64_t at, int64_t j, int count) {
          const F gate = take<F>(input() + 2 * at - j, count);
          const F up = take<F>(input() + 2 * at - j + p.width, count);
          put(out + at, gate * logistic(gate).share * up, count);
        });
    }
  }

  // Blocks of rows.
  void backward(const ActivationBackwardParams& g, int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kActivationRows;
      const int64_t last = first + kActivationRows < p.rows ? first + kActivationRows : p.rows;
      switch (p.activation) {
        case Activation::kGelu: gelu_backward<ExactGelu<T>>(g, block, first, last); break;
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
  // Calls body(place in out, column, lanes) for the vectors of these rows.
  template <class Body>
  FASTGEN_MEMBER void for_vectors(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < p.width; j += kWidth) {
        body(row * p.width + j, j, p.width - j < kWidth ? int(p.width - j) : kWidth);
      }
    }
  }

  template <class Function>
  void gelu_backward(const ActivationBackwardParams& g, int64_t block, int64_t first, int64_t last) const {
    const Storage* grad = static_cast<const Storage*>(g.grad);
    Storage* out = static_cast<Storage*>(g.grad_input);
    T* sums = g.sums == nullptr ? nullptr : static_cast<T*>(g.sums) + block * p.width;
    for (int64_t j = 0; j < p.width && sums != nullptr; ++j) sums[j] = T(0);
    for_vectors(first, last, [&](int64_t at, int64_t j, int count) {
      const F d = take<F>(grad + at, count) * Function::slope(biased(at, j, count));
      put(out + at, d, count);
      if (sums != nullptr) put(sums + j, take<F>(sums + j, count) + d, count);
    });
  }

  void swiglu_backward(const ActivationBackwardParams& g, int64_t first, int64_t last) const {
    const Storage* grad = static_cast<const Storage*>(g.grad);
    Storage* out = static_cast<Storage*>(g.grad_input);
    for_vectors(first, last, [&](int64_t at, int64_t j, int count) {
      const int64_t of_gate = 2 * at - j, of_up = of_gate + p.width;
      const F gate = take<F>(input() + of_gate, count), up = take<F>(input() + of_up, count);
      const F d = take<F>(grad + at, count);
      const Logistic<T> l = logistic(gate);
      put(out + of_gate, d * up * multiply_add(gate, l.spread, l.share), count);
      put(out + of_up, d * gate * l.share, count);
    });
  }

  static FASTGEN_MEMBER Logistic<T> logistic(F x) { return Logistic<T>(x * F(Constants<T>::kLog2E)); }
  const Storage* input() const { return static_cast<const Storage*>(p.input); }

  FASTGEN_MEMBER F biased(int64_t at, int64_t j, int count) const {
    const F x = take<F>(input() + at, count);
    if (p.bias == nullptr) return x;
    if (p.bias_dtype == p.dtype) return x + take<F>(static_cast<const Storage*>(p.bias) + j, count);
    return x + take<F>(static_cast<const T*>(p.bias) + j, count);
  }

  const ActivationParams& p;
};

void activation(const ActivationParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto number) { ActivationRows<decltype(number)>(p).forward(begin, end); });
}
void activation_backward(const ActivationBackwardParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto number) { ActivationRows<decltype(number)>(p).backward(p, begin, end); });
}
void activation_add_blocks(const ActivationBackwardParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto number) { ActivationRows<decltype(number)>(p).add_blocks(p, begin, end); });
}

}  // namespace
}  // namespace fastgen
