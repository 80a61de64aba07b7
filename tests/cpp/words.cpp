// The functions below one instruction set's kernels, on words and numbers of the caller's choice: extreme
// words cannot be found in the stream by drawing. FASTGEN_VEC names the vector header. All lengths are in
// whole steps of kStep<T> elements.
#include FASTGEN_VEC

#include "../../csrc/cpu/random.inl"
#include "../../csrc/cpu/reparameterize.inl"
#include "../../csrc/common/activations.h"

using namespace fastgen;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <class T>
using Bits_ = typename Constants<T>::Bits;

template <class T, class Distribution>
void values(const Distribution& distribution, const Bits_<T>* even, const Bits_<T>* odd, int64_t count, T* y,
            T* y_odd) {
  typename Work<T>::F u, v, a, b;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    load(reinterpret_cast<const T*>(even + i), u);
    load(reinterpret_cast<const T*>(odd + i), v);
    distribution(bits(u), bits(v), a, b);
    store(y + i, a);
    store(y_odd + i, b);
  }
}

template <class T>
void draw(int which, const Bits_<T>* even, const Bits_<T>* odd, int64_t count, const RandomParams& p, T* y, T* y_odd) {
  switch (Distribution(which)) {
    case Distribution::kNormal: return values<T>(StandardNormal<T>(), even, odd, count, y, y_odd);
    case Distribution::kExponential: return values<T>(Exponential<T>(p), even, odd, count, y, y_odd);
    case Distribution::kUniform: return values<T>(Uniform<T>(p, sizeof(T) == 4 ? 24 : 53), even, odd, count, y, y_odd);
    case Distribution::kBernoulli:
      if constexpr (sizeof(T) == 4) return values<T>(Bernoulli(p), even, odd, count, y, y_odd);
      break;
    case Distribution::kBits: return values<T>(Bits<T>(), even, odd, count, y, y_odd);
  }
}

template <class T>
void elementary(int which, const T* x, int64_t count, T* y) {
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  F v;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    load(x + i, v);
    store(y + i, which == 0   ? exponentials<T, U>(v + v).of_half
                 : which == 1 ? exponentials<T, U>(v).minus_1
                 : which == 2 ? exponentials<T, U>(v).minus_1_minus
                 : which == 3 ? sigmoid<T, U>(v)
                              : hyperbolic_tangent<T, U>(v));
  }
}

template <class Half>
void convert(const Half* from, const float* floats, int64_t count, float* wide, Half* to) {
  Isa::F32 v;
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    load(from + i, v);
    store(wide + i, v);
    load(floats + i, v);
    store(to + i, v);
  }
}

}  // namespace

EXPORT int step() { return kStep<float>; }
EXPORT int blocks() { return Isa::kBlocks; }

// counters and out: [4][blocks()], word by word.
EXPORT void philox(const uint64_t* counters, uint64_t seed, uint64_t* out) {
  Isa::U64 c[4][1];
  memcpy(c, counters, sizeof c);
  philox4x32_10(c[0], c[1], c[2], c[3], PhiloxKey(seed));
  memcpy(out, c, sizeof c);
}

EXPORT void draw32(int which, const uint32_t* even, const uint32_t* odd, int64_t count, double a, double b, float* y,
                   float* y_odd) {
  RandomParams p{};
  p.a = a;
  p.b = b;
  draw<float>(which, even, odd, count, p, y, y_odd);
}
EXPORT void draw64(int which, const uint64_t* even, const uint64_t* odd, int64_t count, double a, double b, double* y,
                   double* y_odd) {
  RandomParams p{};
  p.a = a;
  p.b = b;
  draw<double>(which, even, odd, count, p, y, y_odd);
}

// which: 0 exp(x), 1 exp(x) - 1, 2 exp(x) - 1 - x, 3 sigmoid(x), 4 tanh(x).
EXPORT void elementary32(int which, const float* x, int64_t count, float* y) { elementary<float>(which, x, count, y); }
EXPORT void elementary64(int which, const double* x, int64_t count, double* y) {
  elementary<double>(which, x, count, y);
}

EXPORT void convert_float16(const uint16_t* half, const float* floats, int64_t count, float* wide, uint16_t* narrow) {
  convert(reinterpret_cast<const Float16*>(half), floats, count, wide, reinterpret_cast<Float16*>(narrow));
}
EXPORT void convert_bfloat16(const uint16_t* half, const float* floats, int64_t count, float* wide, uint16_t* narrow) {
  convert(reinterpret_cast<const BFloat16*>(half), floats, count, wide, reinterpret_cast<BFloat16*>(narrow));
}

// Standard exponentials and both normals of the words first, first + stride, ... (count of them, angle = word
// times an odd number): smallest and largest values, and the sum of all bit patterns.
EXPORT uint64_t scan32(uint32_t first, uint32_t stride, int64_t count, float* range) {
  constexpr int kLane = kLanes<float>;
  uint32_t word[kLane];
  Isa::U32 w;
  Isa::F32 even, odd;
  constexpr float kInfinity = __builtin_inff();
  range[0] = range[2] = kInfinity;
  range[1] = range[3] = -kInfinity;
  uint64_t sum = 0;
  float lanes[3][kLane];
  for (int64_t i = 0; i < count; i += kLane) {
    for (int k = 0; k < kLane; ++k) word[k] = first + uint32_t(i + k) * stride;
    memcpy(&w, word, sizeof w);
    Isa::U32 angle;
    for (int k = 0; k < kLane; ++k) word[k] *= 0x9E3779B1u;
    memcpy(&angle, word, sizeof angle);
    store(lanes[0], standard_exponential<float, Isa::F32>(w));
    normal_pair<float>(w, angle, even, odd);
    store(lanes[1], even);
    store(lanes[2], odd);
    for (int k = 0; k < kLane; ++k) {
      range[0] = lanes[0][k] < range[0] ? lanes[0][k] : range[0];
      range[1] = lanes[0][k] > range[1] ? lanes[0][k] : range[1];
      for (int j = 0; j < 3; ++j) {
        if (!(lanes[j][k] - lanes[j][k] == 0.0f)) range[3] = kInfinity;  // not finite
        const float size = lanes[j][k] < 0 ? -lanes[j][k] : lanes[j][k];
        if (j > 0 && size < range[2]) range[2] = size;
        if (j > 0 && size > range[3]) range[3] = size;
        sum += bits_of(lanes[j][k]);
      }
    }
  }
  return sum;
}
