// The operations of vec_generic.h on 256-bit registers. Needs AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "../common/dtype.h"
#include "../common/math.h"

namespace fastgen {
namespace {

struct U64 {
  __m256i v;
  U64() = default;
  FASTGEN_MEMBER U64(__m256i x) : v(x) {}
  FASTGEN_MEMBER explicit U64(uint64_t x) : v(_mm256_set1_epi64x(int64_t(x))) {}
};
struct U32 {
  __m256i v;
  U32() = default;
  FASTGEN_MEMBER U32(__m256i x) : v(x) {}
  FASTGEN_MEMBER explicit U32(uint32_t x) : v(_mm256_set1_epi32(int32_t(x))) {}
};
struct F32 {
  __m256 v;
  F32() = default;
  FASTGEN_MEMBER F32(__m256 x) : v(x) {}
  FASTGEN_MEMBER explicit F32(float x) : v(_mm256_set1_ps(x)) {}
};
struct F64 {
  __m256d v;
  F64() = default;
  FASTGEN_MEMBER F64(__m256d x) : v(x) {}
  FASTGEN_MEMBER explicit F64(double x) : v(_mm256_set1_pd(x)) {}
};
// A mask is the top bit of each lane, as blendv reads it.
struct M32 {
  __m256 v;
};
struct M64 {
  __m256d v;
};

FASTGEN_FN U32 bits(F32 a) { return _mm256_castps_si256(a.v); }
FASTGEN_FN U64 bits(F64 a) { return _mm256_castpd_si256(a.v); }
FASTGEN_FN F32 real(U32 a) { return _mm256_castsi256_ps(a.v); }
FASTGEN_FN F64 real(U64 a) { return _mm256_castsi256_pd(a.v); }

FASTGEN_FN F32 operator+(F32 a, F32 b) { return _mm256_add_ps(a.v, b.v); }
FASTGEN_FN F32 operator-(F32 a, F32 b) { return _mm256_sub_ps(a.v, b.v); }
FASTGEN_FN F32 operator*(F32 a, F32 b) { return _mm256_mul_ps(a.v, b.v); }
FASTGEN_FN F64 operator+(F64 a, F64 b) { return _mm256_add_pd(a.v, b.v); }
FASTGEN_FN F64 operator-(F64 a, F64 b) { return _mm256_sub_pd(a.v, b.v); }
FASTGEN_FN F64 operator*(F64 a, F64 b) { return _mm256_mul_pd(a.v, b.v); }
FASTGEN_FN F32 operator/(F32 a, F32 b) { return _mm256_div_ps(a.v, b.v); }
FASTGEN_FN F64 operator/(F64 a, F64 b) { return _mm256_div_pd(a.v, b.v); }
FASTGEN_FN F32 multiply_add(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FASTGEN_FN F64 multiply_add(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
FASTGEN_FN F32 root(F32 a) { return _mm256_sqrt_ps(a.v); }
FASTGEN_FN F64 root(F64 a) { return _mm256_sqrt_pd(a.v); }
FASTGEN_FN F32 smaller(F32 a, F32 b) { return _mm256_min_ps(a.v, b.v); }
FASTGEN_FN F64 smaller(F64 a, F64 b) { return _mm256_min_pd(a.v, b.v); }
FASTGEN_FN F32 larger(F32 a, F32 b) { return _mm256_max_ps(a.v, b.v); }
FASTGEN_FN F64 larger(F64 a, F64 b) { return _mm256_max_pd(a.v, b.v); }

FASTGEN_FN U32 operator+(U32 a, U32 b) { return _mm256_add_epi32(a.v, b.v); }
FASTGEN_FN U32 operator-(U32 a, U32 b) { return _mm256_sub_epi32(a.v, b.v); }
FASTGEN_FN U32 operator&(U32 a, U32 b) { return _mm256_and_si256(a.v, b.v); }
FASTGEN_FN U32 operator^(U32 a, U32 b) { return _mm256_xor_si256(a.v, b.v); }
FASTGEN_FN U32 operator<<(U32 a, int count) { return _mm256_slli_epi32(a.v, count); }
FASTGEN_FN U32 operator>>(U32 a, int count) { return _mm256_srli_epi32(a.v, count); }
FASTGEN_FN U64 operator+(U64 a, U64 b) { return _mm256_add_epi64(a.v, b.v); }
FASTGEN_FN U64 operator-(U64 a, U64 b) { return _mm256_sub_epi64(a.v, b.v); }
FASTGEN_FN U64 operator&(U64 a, U64 b) { return _mm256_and_si256(a.v, b.v); }
FASTGEN_FN U64 operator^(U64 a, U64 b) { return _mm256_xor_si256(a.v, b.v); }
FASTGEN_FN U64 operator<<(U64 a, int count) { return _mm256_slli_epi64(a.v, count); }
FASTGEN_FN U64 operator>>(U64 a, int count) { return _mm256_srli_epi64(a.v, count); }
FASTGEN_FN F32 absolute(F32 a) { return real(bits(a) & U32(0x7fffffffu)); }
FASTGEN_FN F64 absolute(F64 a) { return real(bits(a) & U64(0x7fffffffffffffffull)); }
template <int kCount>
FASTGEN_FN U32 shift_right_signed(U32 a) {
  return _mm256_srai_epi32(a.v, kCount);
}
template <int kCount>
FASTGEN_FN U64 shift_right_signed(U64 a) {
  const uint64_t top = 1ull << 63;
  return ((a ^ U64(top)) >> kCount) - U64(top >> kCount);
}

FASTGEN_FN M32 negative(U32 a) { return {_mm256_castsi256_ps(a.v)}; }
FASTGEN_FN M64 negative(U64 a) { return {_mm256_castsi256_pd(a.v)}; }
FASTGEN_FN M32 less(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FASTGEN_FN M64 less(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
FASTGEN_FN M32 less(U32 a, U32 b) {
  const U32 top(0x80000000u);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32((b ^ top).v, (a ^ top).v))};
}
FASTGEN_FN F32 select(M32 m, F32 yes, F32 no) { return _mm256_blendv_ps(no.v, yes.v, m.v); }
FASTGEN_FN F64 select(M64 m, F64 yes, F64 no) { return _mm256_blendv_pd(no.v, yes.v, m.v); }
FASTGEN_FN U32 select(M32 m, U32 yes, U32 no) { return bits(select(m, real(yes), real(no))); }
FASTGEN_FN U64 select(M64 m, U64 yes, U64 no) { return bits(select(m, real(yes), real(no))); }

FASTGEN_FN F32 signed_to_real(U32 a) { return _mm256_cvtepi32_ps(a.v); }
FASTGEN_FN F64 signed_to_real(U64 a) {
  // high * 2^32 (signed) and low, each exact inside a double of a fixed exponent; one rounding at the end.
  const F64 high = real((a >> 32) ^ U64(0x4530000080000000ull));  // 2^84 + 2^63 + high * 2^32
  const F64 low = real(U64(_mm256_blend_epi32(_mm256_set1_epi64x(0x4330000000000000ll), a.v, 0x55)));  // 2^52 + low
  return (high - F64(0x1.00000801p84)) + low;  // 2^84 + 2^63 + 2^52
}

template <class T>
FASTGEN_FN F32 times_power_of_2(F32 x, F32, U32 n) {
  return times_power_of_2_by_halves<T>(x, n);
}
template <class T>
FASTGEN_FN F64 times_power_of_2(F64 x, F64, U64 n) {
  return times_power_of_2_by_halves<T>(x, n);
}

FASTGEN_FN U64 mul32(U64 a, U64 b) { return _mm256_mul_epu32(a.v, b.v); }
FASTGEN_FN U64 xor3(U64 a, U64 b, U64 c) { return a ^ b ^ c; }
FASTGEN_FN U64 join(U64 a, U64 b) { return _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xAA); }
FASTGEN_FN U32 join32(U64 a, U64 b) { return join(a, b).v; }

FASTGEN_FN void interleave(F32 even, F32 odd, F32& first, F32& second) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  first = _mm256_permute2f128_ps(low, high, 0x20);
  second = _mm256_permute2f128_ps(low, high, 0x31);
}
FASTGEN_FN void interleave(F64 even, F64 odd, F64& first, F64& second) {
  const __m256d low = _mm256_unpacklo_pd(even.v, odd.v), high = _mm256_unpackhi_pd(even.v, odd.v);
  first = _mm256_permute2f128_pd(low, high, 0x20);
  second = _mm256_permute2f128_pd(low, high, 0x31);
}

FASTGEN_FN void load(const float* p, F32& out) { out.v = _mm256_loadu_ps(p); }
FASTGEN_FN void load(const double* p, F64& out) { out.v = _mm256_loadu_pd(p); }
FASTGEN_FN void load(const BFloat16* p, F32& out) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  out.v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
FASTGEN_FN void load(const Float16* p, F32& out) {
  out.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// 32-bit lanes that fit 16 bits -> their low halves, in order.
FASTGEN_FN __m128i pack16(__m256i x) {
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
FASTGEN_FN void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
FASTGEN_FN void store(double* p, F64 a) { _mm256_storeu_pd(p, a.v); }
FASTGEN_FN void store(BFloat16* p, F32 a) {
  const U32 x = bits(a);
  const U32 high = x >> 16;
  const U32 rounded = (x + U32(0x7fffu) + (high & U32(1u))) >> 16;
  const U32 quiet = _mm256_or_si256(high.v, _mm256_set1_epi32(0x40));
  const M32 nan = {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)};
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), pack16(select(nan, quiet, rounded).v));
}
FASTGEN_FN void store(Float16* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
FASTGEN_FN void store(double* p, F32 a) {
  _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
  _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
}
FASTGEN_FN void store(bool* p, F32 a) {  // 0 or 1
  const __m128i words = pack16(_mm256_cvtps_epi32(a.v));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

// The first `count` lanes, zero in the rest; and their store.
FASTGEN_FN __m256i first_mask32(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTGEN_FN __m256i first_mask64(int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTGEN_FN void load_first(const float* p, int count, F32& out) { out.v = _mm256_maskload_ps(p, first_mask32(count)); }
FASTGEN_FN void load_first(const double* p, int count, F64& out) { out.v = _mm256_maskload_pd(p, first_mask64(count)); }
template <class Half>
FASTGEN_FN void load_first(const Half* p, int count, F32& out) {
  Half lanes[8] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  load(lanes, out);
}
FASTGEN_FN void store_first(float* p, int count, F32 a) { _mm256_maskstore_ps(p, first_mask32(count), a.v); }
FASTGEN_FN void store_first(double* p, int count, F64 a) { _mm256_maskstore_pd(p, first_mask64(count), a.v); }
template <class Half>
FASTGEN_FN void store_first(Half* p, int count, F32 a) {
  Half lanes[8];
  store(lanes, a);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}
FASTGEN_FN F32 keep_first(F32 a, int count) { return _mm256_and_ps(a.v, _mm256_castsi256_ps(first_mask32(count))); }
FASTGEN_FN F64 keep_first(F64 a, int count) { return _mm256_and_pd(a.v, _mm256_castsi256_pd(first_mask64(count))); }

// Halves added until one lane is left: the order of every instruction set.
FASTGEN_FN float sum(F32 a) {
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}
FASTGEN_FN double sum(F64 a) {
  const __m128d by2 = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(by2, _mm_unpackhi_pd(by2, by2)));
}
// out[i] = sum(a[i]), in the order of sum.
FASTGEN_FN void sum4(const F32 (&a)[4], float* out) {
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a[0].v, a[1].v, 0x20),  // 128 bits of a, 128 of b
                                  _mm256_permute2f128_ps(a[0].v, a[1].v, 0x31));
  const __m256 cd =
      _mm256_add_ps(_mm256_permute2f128_ps(a[2].v, a[3].v, 0x20), _mm256_permute2f128_ps(a[2].v, a[3].v, 0x31));
  const __m256 by2 = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));  // aacc bbdd
  const __m256 by1 = _mm256_add_ps(by2, _mm256_movehdup_ps(by2));                                      // a.c. b.d.
  const __m128 ac = _mm256_castps256_ps128(by1), bd = _mm256_extractf128_ps(by1, 1);
  _mm_storeu_ps(out, _mm_blend_ps(ac, _mm_moveldup_ps(bd), 0xA));
}
FASTGEN_FN void sum4(const F64 (&a)[4], double* out) {
  const __m256d ab =
      _mm256_add_pd(_mm256_permute2f128_pd(a[0].v, a[1].v, 0x20), _mm256_permute2f128_pd(a[0].v, a[1].v, 0x31));
  const __m256d cd =
      _mm256_add_pd(_mm256_permute2f128_pd(a[2].v, a[3].v, 0x20), _mm256_permute2f128_pd(a[2].v, a[3].v, 0x31));
  const __m256d acbd = _mm256_add_pd(_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
  _mm256_storeu_pd(out, _mm256_permute4x64_pd(acbd, 0xD8));
}

struct Isa {
  static constexpr int kBlocks = 4;
  static constexpr int kChains = 2;  // as many counters as the registers hold at once
  static constexpr int kSums = 12;   // vectors of a product that the registers hold at once
  using U64 = fastgen::U64;
  using F64 = fastgen::F64;
  using U32 = fastgen::U32;
  using F32 = fastgen::F32;
};

FASTGEN_FN U64 count_from(uint64_t first) { return U64(first) + U64(_mm256_setr_epi64x(0, 1, 2, 3)); }

}  // namespace
}  // namespace fastgen
