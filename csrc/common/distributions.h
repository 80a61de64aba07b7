// From counters to values: the words of the stream and the distributions made of them, over the vectors
// of Isa (see cpu/vec_*.h; CUDA threads use vec_generic.h with one block).
#pragma once

#include "math.h"
#include "params.h"
#include "philox.h"

namespace fastgen {
namespace {

// The vectors that a stream of T = float or double is made of.
template <class T>
struct Work;
template <>
struct Work<float> {
  using F = Isa::F32;
  using U = Isa::U32;
  static constexpr int kPerBlock = 4;  // elements a Philox block gives
};
template <>
struct Work<double> {
  using F = Isa::F64;
  using U = Isa::U64;
  static constexpr int kPerBlock = 2;
};
template <class T>
constexpr int kLanes = int(sizeof(typename Work<T>::F) / sizeof(T));
// One step: kBlocks blocks, two vectors, the even elements and the odd ones.
template <class T>
constexpr int kStep = 2 * kLanes<T>;

// The even and odd words of N steps from `block` on.
template <class T, int N>
FASTGEN_FN void words(uint64_t block, const PhiloxKey& key, typename Work<T>::U (&even)[N],
                      typename Work<T>::U (&odd)[N]) {
  constexpr bool kWide = sizeof(T) == 8;
  using U64 = Isa::U64;
  U64 c0[N], c1[N], c2[N], c3[N];
  FASTGEN_UNROLL
  for (int n = 0; n < N; ++n) {
    c0[n] = count_from(block + uint64_t(n) * Isa::kBlocks) & U64(~0ull >> (kWide ? 1 : 2));
    c1[n] = c0[n] >> 32;
    c2[n] = U64(0ull);
    c3[n] = U64(kWide ? kWidth64 : kWidth32);
  }
  philox4x32_10(c0, c1, c2, c3, key);
  FASTGEN_UNROLL
  for (int n = 0; n < N; ++n) {
    if constexpr (kWide) {
      even[n] = join(c0[n], c1[n]);
      odd[n] = join(c2[n], c3[n]);
    } else {
      even[n] = join32(c0[n], c2[n]);
      odd[n] = join32(c1[n], c3[n]);
    }
  }
}

// Distributions: a vector of even words and one of odd words become values.

template <class T>
struct Bits {
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  FASTGEN_MEMBER void operator()(U even, U odd, F& y, F& y_odd) const {
    y = real(even);
    y_odd = real(odd);
  }
};

template <class T>
struct StandardNormal {
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  FASTGEN_MEMBER void operator()(U even, U odd, F& y, F& y_odd) const { normal_pair<T>(even, odd, y, y_odd); }
};

template <class T>
struct Exponential {
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  F mean;
  FASTGEN_MEMBER explicit Exponential(const RandomParams& p) : mean(T(1.0 / p.a)) {}
  FASTGEN_MEMBER void operator()(U even, U odd, F& y, F& y_odd) const {
    y = standard_exponential<T, F>(even) * mean;
    y_odd = standard_exponential<T, F>(odd) * mean;
  }
};

// The leading bits of the word: as many as the significand of the stored type holds.
template <class T>
struct Uniform {
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  static constexpr int kKept = sizeof(T) == 4 ? 24 : 53;
  U kept;
  F low, width;
  FASTGEN_MEMBER Uniform(const RandomParams& p, int significand)
      : kept(typename Constants<T>::Bits(~0ull << (kKept - significand))), low(T(p.a)), width(T(p.b)) {}
  FASTGEN_MEMBER F one(U word) const {
    const U leading = (word >> (8 * int(sizeof(T)) - kKept)) & kept;
    return low + signed_to_real(leading) * F(T(1) / T(1ull << kKept)) * width;
  }
  FASTGEN_MEMBER void operator()(U even, U odd, F& y, F& y_odd) const {
    y = one(even);
    y_odd = one(odd);
  }
};

struct Bernoulli {
  Isa::U32 last;  // the largest word that counts as true
  Isa::F32 yes;
  FASTGEN_MEMBER explicit Bernoulli(const RandomParams& p)
      : last(uint32_t(uint64_t(p.a) - 1)), yes(p.a > 0 ? 1.0f : 0.0f) {}
  FASTGEN_MEMBER void operator()(Isa::U32 even, Isa::U32 odd, Isa::F32& y, Isa::F32& y_odd) const {
    y = select(less(last, even), Isa::F32(0.0f), yes);
    y_odd = select(less(last, odd), Isa::F32(0.0f), yes);
  }
};

}  // namespace
}  // namespace fastgen
