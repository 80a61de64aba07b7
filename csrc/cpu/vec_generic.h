// Vectors as plain arrays: the definition of every operation that vec_avx2.h and vec_avx512.h spell in
// intrinsics, and the code that runs where neither instruction set does. With one block it is also what
// the CUDA kernels compute with.
#pragma once

#include <cmath>

#include "../common/dtype.h"
#include "../common/math.h"

#ifndef FASTGEN_GENERIC_BLOCKS
#define FASTGEN_GENERIC_BLOCKS 2
#endif

namespace fastgen {
namespace {

template <class T, int N>
struct Lanes {
  T v[N];

  Lanes() = default;
  FASTGEN_MEMBER explicit Lanes(T x) {
    for (int i = 0; i < N; ++i) v[i] = x;
  }
};

#define FASTGEN_LANEWISE(op)                                         \
  template <class T, int N>                                          \
  FASTGEN_FN Lanes<T, N> operator op(Lanes<T, N> a, Lanes<T, N> b) { \
    for (int i = 0; i < N; ++i) a.v[i] = T(a.v[i] op b.v[i]);        \
    return a;                                                        \
  }
FASTGEN_LANEWISE(+)
FASTGEN_LANEWISE(-)
FASTGEN_LANEWISE(*)
FASTGEN_LANEWISE(/)
FASTGEN_LANEWISE(&)
FASTGEN_LANEWISE(^)
#undef FASTGEN_LANEWISE

// a b + c: with one rounding where the instruction set has it, with two here.
template <class T, int N>
FASTGEN_FN Lanes<T, N> multiply_add(Lanes<T, N> a, Lanes<T, N> b, Lanes<T, N> c) {
  return a * b + c;
}

template <class T, int N>
FASTGEN_FN Lanes<T, N> operator<<(Lanes<T, N> a, int count) {
  for (int i = 0; i < N; ++i) a.v[i] = T(a.v[i] << count);
  return a;
}
template <class T, int N>
FASTGEN_FN Lanes<T, N> operator>>(Lanes<T, N> a, int count) {
  for (int i = 0; i < N; ++i) a.v[i] = T(a.v[i] >> count);
  return a;
}
template <int kCount, class T, int N>
FASTGEN_FN Lanes<T, N> shift_right_signed(Lanes<T, N> a) {
  constexpr T kTop = T(1) << (8 * sizeof(T) - 1);
  for (int i = 0; i < N; ++i) a.v[i] = T(((a.v[i] ^ kTop) >> kCount) - (kTop >> kCount));
  return a;
}

template <int N>
struct Mask {
  bool v[N];
};

template <class T, int N>
FASTGEN_FN Mask<N> negative(Lanes<T, N> a) {
  Mask<N> m;
  for (int i = 0; i < N; ++i) m.v[i] = (a.v[i] >> (8 * sizeof(T) - 1)) != 0;
  return m;
}
template <class T, int N>
FASTGEN_FN Mask<N> less(Lanes<T, N> a, Lanes<T, N> b) {  // unsigned where T is an integer
  Mask<N> m;
  for (int i = 0; i < N; ++i) m.v[i] = a.v[i] < b.v[i];
  return m;
}
template <class T, int N>
FASTGEN_FN Lanes<T, N> select(Mask<N> m, Lanes<T, N> yes, Lanes<T, N> no) {
  for (int i = 0; i < N; ++i) no.v[i] = m.v[i] ? yes.v[i] : no.v[i];
  return no;
}
template <class T, int N>
FASTGEN_FN Lanes<T, N> smaller(Lanes<T, N> a, Lanes<T, N> b) {
  for (int i = 0; i < N; ++i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return b;
}
template <class T, int N>
FASTGEN_FN Lanes<T, N> larger(Lanes<T, N> a, Lanes<T, N> b) {
  for (int i = 0; i < N; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}

FASTGEN_FN float square_root(float x) { return sqrtf(x); }
FASTGEN_FN double square_root(double x) { return sqrt(x); }

template <class T, int N>
FASTGEN_FN Lanes<T, N> root(Lanes<T, N> a) {
  for (int i = 0; i < N; ++i) a.v[i] = square_root(a.v[i]);
  return a;
}

// Reinterpretations and conversions between a real type and the unsigned integer of its width.
template <class To, class From, int N>
FASTGEN_FN Lanes<To, N> same_bits(Lanes<From, N> a) {
  static_assert(sizeof(To) == sizeof(From), "");
  Lanes<To, N> out;
  memcpy(out.v, a.v, sizeof out.v);
  return out;
}
template <int N>
FASTGEN_FN Lanes<uint32_t, N> bits(Lanes<float, N> a) {
  return same_bits<uint32_t>(a);
}
template <int N>
FASTGEN_FN Lanes<uint64_t, N> bits(Lanes<double, N> a) {
  return same_bits<uint64_t>(a);
}
template <int N>
FASTGEN_FN Lanes<float, N> real(Lanes<uint32_t, N> a) {
  return same_bits<float>(a);
}
template <int N>
FASTGEN_FN Lanes<double, N> real(Lanes<uint64_t, N> a) {
  return same_bits<double>(a);
}
template <int N>
FASTGEN_FN Lanes<float, N> signed_to_real(Lanes<uint32_t, N> a) {
  Lanes<float, N> out;
  for (int i = 0; i < N; ++i) out.v[i] = float(int32_t(a.v[i]));
  return out;
}
template <int N>
FASTGEN_FN Lanes<double, N> signed_to_real(Lanes<uint64_t, N> a) {
  Lanes<double, N> out;
  for (int i = 0; i < N; ++i) out.v[i] = double(int64_t(a.v[i]));
  return out;
}
template <int N>
FASTGEN_FN Lanes<float, N> absolute(Lanes<float, N> a) {
  return real(bits(a) & Lanes<uint32_t, N>(0x7fffffffu));
}
template <int N>
FASTGEN_FN Lanes<double, N> absolute(Lanes<double, N> a) {
  return real(bits(a) & Lanes<uint64_t, N>(0x7fffffffffffffffull));
}

template <class T, class Real, class Bits, int N>
FASTGEN_FN Lanes<Real, N> times_power_of_2(Lanes<Real, N> x, Lanes<Real, N>, Lanes<Bits, N> n) {
  return times_power_of_2_by_halves<T>(x, n);
}

// Philox: widening product of the low halves, and a three-way exclusive or.
template <int N>
FASTGEN_FN Lanes<uint64_t, N> mul32(Lanes<uint64_t, N> a, Lanes<uint64_t, N> b) {
  for (int i = 0; i < N; ++i) a.v[i] = uint64_t(uint32_t(a.v[i])) * uint32_t(b.v[i]);
  return a;
}
template <int N>
FASTGEN_FN Lanes<uint64_t, N> xor3(Lanes<uint64_t, N> a, Lanes<uint64_t, N> b, Lanes<uint64_t, N> c) {
  return a ^ b ^ c;
}
// Lane i: low half from a, high half from the low half of b.
template <int N>
FASTGEN_FN Lanes<uint64_t, N> join(Lanes<uint64_t, N> a, Lanes<uint64_t, N> b) {
  for (int i = 0; i < N; ++i) a.v[i] = (a.v[i] & 0xffffffffull) | b.v[i] << 32;
  return a;
}
// The same, as twice as many 32-bit lanes, low half first.
template <int N>
FASTGEN_FN Lanes<uint32_t, 2 * N> join32(Lanes<uint64_t, N> a, Lanes<uint64_t, N> b) {
  Lanes<uint32_t, 2 * N> out;
  for (int i = 0; i < N; ++i) {
    out.v[2 * i] = uint32_t(a.v[i]);
    out.v[2 * i + 1] = uint32_t(b.v[i]);
  }
  return out;
}
// even, odd -> even[0] odd[0] even[1] odd[1] ..., in two vectors.
template <class T, int N>
FASTGEN_FN void interleave(Lanes<T, N> even, Lanes<T, N> odd, Lanes<T, N>& first, Lanes<T, N>& second) {
  T all[2 * N];
  for (int i = 0; i < N; ++i) {
    all[2 * i] = even.v[i];
    all[2 * i + 1] = odd.v[i];
  }
  memcpy(first.v, all, sizeof first.v);
  memcpy(second.v, all + N, sizeof second.v);
}

// Halves added until one lane is left: the order of every instruction set.
template <class T, int N>
FASTGEN_FN T sum(Lanes<T, N> a) {
  for (int width = N / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
  }
  return a.v[0];
}
// out[i] = sum(a[i]).
template <class T, int N>
FASTGEN_FN void sum4(const Lanes<T, N> (&a)[4], T* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
}

template <class Storage, class T, int N>
FASTGEN_FN void load(const Storage* p, Lanes<T, N>& out) {
  for (int i = 0; i < N; ++i) out.v[i] = widen(p[i]);
}
template <class Storage, class T, int N>
FASTGEN_FN void store(Storage* p, Lanes<T, N> a) {
  for (int i = 0; i < N; ++i) narrow(a.v[i], p + i);
}

// The first `count` lanes, zero in the rest; and their store.
template <class Storage, class T, int N>
FASTGEN_FN void load_first(const Storage* p, int count, Lanes<T, N>& out) {
  for (int i = 0; i < N; ++i) out.v[i] = i < count ? widen(p[i]) : T(0);
}
template <class Storage, class T, int N>
FASTGEN_FN void store_first(Storage* p, int count, Lanes<T, N> a) {
  for (int i = 0; i < count; ++i) narrow(a.v[i], p + i);
}
template <class T, int N>
FASTGEN_FN Lanes<T, N> keep_first(Lanes<T, N> a, int count) {
  for (int i = 0; i < N; ++i) a.v[i] = i < count ? a.v[i] : T(0);
  return a;
}

struct Isa {
  static constexpr int kBlocks = FASTGEN_GENERIC_BLOCKS;  // Philox blocks a vector step makes
  static constexpr int kChains = 1;                       // steps whose rounds run side by side
  static constexpr int kSums = 8;                         // vectors of a product that the registers hold at once
  using U64 = Lanes<uint64_t, kBlocks>;
  using F64 = Lanes<double, kBlocks>;
  using U32 = Lanes<uint32_t, 2 * kBlocks>;
  using F32 = Lanes<float, 2 * kBlocks>;
};

FASTGEN_FN Isa::U64 count_from(uint64_t first) {
  Isa::U64 out;
  for (int i = 0; i < Isa::kBlocks; ++i) out.v[i] = first + uint64_t(i);
  return out;
}

}  // namespace
}  // namespace fastgen
