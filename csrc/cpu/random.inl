// Filling memory from the random stream, written once over Isa (after a vec_*.h, which defines it).
#pragma once

#include "fill.inl"

namespace fastgen {
namespace {

// out[i] = storage(from[i]), i < count, written in whole vectors while they last.
template <class T, class Storage>
FASTGEN_FN void narrow_all(const T* from, int64_t count, Storage* out) {
  typename Work<T>::F value;
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    load(from + i, value);
    store(out + i, value);
  }
  for (; i < count; ++i) narrow(from[i], out + i);
}

// Elements [begin, end) of the output, a tile at a time: draw, finish(tile, count) in place, store.
template <class T, class Storage, class Distribution, class Finish>
FASTGEN_FN void fill_tiles(const RandomParams& p, int64_t begin, int64_t end, const Distribution& distribution,
                           const Finish& finish) {
  const PhiloxKey key(p.seed);
  Storage* out = static_cast<Storage*>(p.out);
  alignas(64) T tile[kPiece];
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t count = end - i < kPiece ? end - i : kPiece;
    fill<T>(tile, p.offset + uint64_t(i), count, key, distribution);
    finish(tile, count);
    narrow_all(tile, count, out + i);
  }
}

template <class T>
struct Nothing {
  FASTGEN_MEMBER void operator()(T*, int64_t) const {}
};
template <class T>
struct ScaleShift {
  T mean, std;
  FASTGEN_MEMBER void operator()(T* tile, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) tile[i] = mean + std * tile[i];
  }
};

// As fill_tiles, straight into memory where no rounding is needed.
template <class T, class Storage, class Distribution>
FASTGEN_FN void fill_range(const RandomParams& p, int64_t begin, int64_t end, const Distribution& distribution) {
  if constexpr (sizeof(T) == sizeof(Storage)) {
    fill<T>(static_cast<T*>(p.out) + begin, p.offset + uint64_t(begin), end - begin, PhiloxKey(p.seed), distribution);
  } else {
    fill_tiles<T, Storage>(p, begin, end, distribution, Nothing<T>());
  }
}

template <class T, class Storage>
FASTGEN_FN void fill_uniform(const RandomParams& p, int64_t begin, int64_t end, int significand) {
  fill_range<T, Storage>(p, begin, end, Uniform<T>(p, significand));
  if (p.a == 0.0 && p.b == 1.0) return;
  // Rounding to the stored type can reach the upper end: bring such values back under it.
  Storage below;
  narrow(T(p.c), &below);
  Storage* out = static_cast<Storage*>(p.out);
  for (int64_t i = begin; i < end; ++i) {
    if (widen(out[i]) > T(p.c)) out[i] = below;
  }
}

template <class T, class Storage>
FASTGEN_FN void fill_real(const RandomParams& p, int64_t begin, int64_t end) {
  if (p.distribution == Distribution::kExponential) {
    fill_range<T, Storage>(p, begin, end, Exponential<T>(p));
  } else if (p.a == 0.0 && p.b == 1.0) {
    fill_range<T, Storage>(p, begin, end, StandardNormal<T>());
  } else {
    fill_tiles<T, Storage>(p, begin, end, StandardNormal<T>(), ScaleShift<T>{T(p.a), T(p.b)});
  }
}

void random(const RandomParams& p, int64_t begin, int64_t end) {
  switch (p.distribution) {
    case Distribution::kBits:
      if (p.dtype == DType::kInt32) return fill_range<float, float>(p, begin, end, Bits<float>());
      return fill_range<double, double>(p, begin, end, Bits<double>());
    case Distribution::kBernoulli:
      switch (p.dtype) {
        case DType::kBool: return fill_range<float, bool>(p, begin, end, Bernoulli(p));
        case DType::kBFloat16: return fill_range<float, BFloat16>(p, begin, end, Bernoulli(p));
        case DType::kFloat16: return fill_range<float, Float16>(p, begin, end, Bernoulli(p));
        case DType::kFloat64: return fill_range<float, double>(p, begin, end, Bernoulli(p));
        default: return fill_range<float, float>(p, begin, end, Bernoulli(p));
      }
    case Distribution::kUniform:
      switch (p.dtype) {
        case DType::kBFloat16: return fill_uniform<float, BFloat16>(p, begin, end, 8);
        case DType::kFloat16: return fill_uniform<float, Float16>(p, begin, end, 11);
        case DType::kFloat64: return fill_uniform<double, double>(p, begin, end, 53);
        default: return fill_uniform<float, float>(p, begin, end, 24);
      }
    case Distribution::kNormal:
    case Distribution::kExponential:
      switch (p.dtype) {
        case DType::kBFloat16: return fill_real<float, BFloat16>(p, begin, end);
        case DType::kFloat16: return fill_real<float, Float16>(p, begin, end);
        case DType::kFloat64: return fill_real<double, double>(p, begin, end);
        default: return fill_real<float, float>(p, begin, end);
      }
  }
}

}  // namespace
}  // namespace fastgen
