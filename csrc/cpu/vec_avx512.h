// The operations of vec_generic.h on 512-bit registers. Needs AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "../common/dtype.h"

namespace fastgen {
namespace {

struct U64 {
  __m512i v;
  U64() = default;
  FASTGEN_MEMBER U64(__m512i x) : v(x) {}
  FASTGEN_MEMBER explicit U64(uint64_t x) : v(_mm512_set1_epi64(int64_t(x))) {}
};
struct U32 {
  __m512i v;
  U32() = default;
  FASTGEN_MEMBER U32(__m512i x) : v(x) {}
  FASTGEN_MEMBER explicit U32(uint32_t x) : v(_mm512_set1_epi32(int32_t(x))) {}
};
struct F32 {
  __m512 v;
  F32() = default;
  FASTGEN_MEMBER F32(__m512 x) : v(x) {}
  FASTGEN_MEMBER explicit F32(float x) : v(_mm512_set1_ps(x)) {}
};
struct F64 {
  __m512d v;
  F64() = default;
  FASTGEN_MEMBER F64(__m512d x) : v(x) {}
  FASTGEN_MEMBER explicit F64(double x) : v(_mm512_set1_pd(x)) {}
};
struct M32 {
  __mmask16 v;
};
struct M64 {
  __mmask8 v;
};

FASTGEN_FN F32 operator+(F32 a, F32 b) { return _mm512_add_ps(a.v, b.v); }
FASTGEN_FN F32 operator-(F32 a, F32 b) { return _mm512_sub_ps(a.v, b.v); }
FASTGEN_FN F32 operator*(F32 a, F32 b) { return _mm512_mul_ps(a.v, b.v); }
FASTGEN_FN F64 operator+(F64 a, F64 b) { return _mm512_add_pd(a.v, b.v); }
FASTGEN_FN F64 operator-(F64 a, F64 b) { return _mm512_sub_pd(a.v, b.v); }
FASTGEN_FN F64 operator*(F64 a, F64 b) { return _mm512_mul_pd(a.v, b.v); }
FASTGEN_FN F32 operator/(F32 a, F32 b) { return _mm512_div_ps(a.v, b.v); }
FASTGEN_FN F64 operator/(F64 a, F64 b) { return _mm512_div_pd(a.v, b.v); }
FASTGEN_FN F32 multiply_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FASTGEN_FN F64 multiply_add(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
FASTGEN_FN F32 root(F32 a) { return _mm512_sqrt_ps(a.v); }
FASTGEN_FN F64 root(F64 a) { return _mm512_sqrt_pd(a.v); }
FASTGEN_FN F32 absolute(F32 a) { return _mm512_abs_ps(a.v); }
FASTGEN_FN F64 absolute(F64 a) { return _mm512_abs_pd(a.v); }
FASTGEN_FN F32 smaller(F32 a, F32 b) { return _mm512_min_ps(a.v, b.v); }
FASTGEN_FN F64 smaller(F64 a, F64 b) { return _mm512_min_pd(a.v, b.v); }
FASTGEN_FN F32 larger(F32 a, F32 b) { return _mm512_max_ps(a.v, b.v); }
FASTGEN_FN F64 larger(F64 a, F64 b) { return _mm512_max_pd(a.v, b.v); }

FASTGEN_FN U32 operator+(U32 a, U32 b) { return _mm512_add_epi32(a.v, b.v); }
FASTGEN_FN U32 operator-(U32 a, U32 b) { return _mm512_sub_epi32(a.v, b.v); }
FASTGEN_FN U32 operator&(U32 a, U32 b) { return _mm512_and_si512(a.v, b.v); }
FASTGEN_FN U32 operator^(U32 a, U32 b) { return _mm512_xor_si512(a.v, b.v); }
FASTGEN_FN U32 operator<<(U32 a, int count) { return _mm512_slli_epi32(a.v, unsigned(count)); }
FASTGEN_FN U32 operator>>(U32 a, int count) { return _mm512_srli_epi32(a.v, unsigned(count)); }
FASTGEN_FN U64 operator+(U64 a, U64 b) { return _mm512_add_epi64(a.v, b.v); }
FASTGEN_FN U64 operator-(U64 a, U64 b) { return _mm512_sub_epi64(a.v, b.v); }
FASTGEN_FN U64 operator&(U64 a, U64 b) { return _mm512_and_si512(a.v, b.v); }
FASTGEN_FN U64 operator^(U64 a, U64 b) { return _mm512_xor_si512(a.v, b.v); }
FASTGEN_FN U64 operator<<(U64 a, int count) { return _mm512_slli_epi64(a.v, unsigned(count)); }
FASTGEN_FN U64 operator>>(U64 a, int count) { return _mm512_srli_epi64(a.v, unsigned(count)); }
template <int kCount>
FASTGEN_FN U32 shift_right_signed(U32 a) {
  return _mm512_srai_epi32(a.v, kCount);
}
template <int kCount>
FASTGEN_FN U64 shift_right_signed(U64 a) {
  return _mm512_srai_epi64(a.v, kCount);
}

FASTGEN_FN M32 negative(U32 a) { return {_mm512_movepi32_mask(a.v)}; }
FASTGEN_FN M64 negative(U64 a) { return {_mm512_movepi64_mask(a.v)}; }
FASTGEN_FN M32 less(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FASTGEN_FN M64 less(F64 a, F64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
FASTGEN_FN M32 less(U32 a, U32 b) { return {_mm512_cmplt_epu32_mask(a.v, b.v)}; }
FASTGEN_FN F32 select(M32 m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m.v, no.v, yes.v); }
FASTGEN_FN U32 select(M32 m, U32 yes, U32 no) { return _mm512_mask_blend_epi32(m.v, no.v, yes.v); }
FASTGEN_FN F64 select(M64 m, F64 yes, F64 no) { return _mm512_mask_blend_pd(m.v, no.v, yes.v); }
FASTGEN_FN U64 select(M64 m, U64 yes, U64 no) { return _mm512_mask_blend_epi64(m.v, no.v, yes.v); }

FASTGEN_FN U32 bits(F32 a) { return _mm512_castps_si512(a.v); }
FASTGEN_FN U64 bits(F64 a) { return _mm512_castpd_si512(a.v); }
FASTGEN_FN F32 real(U32 a) { return _mm512_castsi512_ps(a.v); }
FASTGEN_FN F64 real(U64 a) { return _mm512_castsi512_pd(a.v); }
FASTGEN_FN F32 signed_to_real(U32 a) { return _mm512_cvtepi32_ps(a.v); }
FASTGEN_FN F64 signed_to_real(U64 a) { return _mm512_cvtepi64_pd(a.v); }

template <class T>
FASTGEN_FN F32 times_power_of_2(F32 x, F32 n, U32) {
  return _mm512_scalef_ps(x.v, n.v);
}
template <class T>
FASTGEN_FN F64 times_power_of_2(F64 x, F64 n, U64) {
  return _mm512_scalef_pd(x.v, n.v);
}

FASTGEN_FN U64 mul32(U64 a, U64 b) { return _mm512_mul_epu32(a.v, b.v); }
FASTGEN_FN U64 xor3(U64 a, U64 b, U64 c) { return _mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96); }
FASTGEN_FN U64 join(U64 a, U64 b) { return _mm512_mask_shuffle_epi32(a.v, 0xAAAA, b.v, _MM_PERM_CCAA); }
FASTGEN_FN U32 join32(U64 a, U64 b) { return join(a, b).v; }

FASTGEN_FN void interleave(F32 even, F32 odd, F32& first, F32& second) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  first = _mm512_permutex2var_ps(even.v, low, odd.v);
  second = _mm512_permutex2var_ps(even.v, high, odd.v);
}
FASTGEN_FN void interleave(F64 even, F64 odd, F64& first, F64& second) {
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  first = _mm512_permutex2var_pd(even.v, low, odd.v);
  second = _mm512_permutex2var_pd(even.v, high, odd.v);
}

FASTGEN_FN void load(const float* p, F32& out) { out.v = _mm512_loadu_ps(p); }
FASTGEN_FN void load(const double* p, F64& out) { out.v = _mm512_loadu_pd(p); }
FASTGEN_FN void load(const BFloat16* p, F32& out) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  out.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
FASTGEN_FN void load(const Float16* p, F32& out) {
  out.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTGEN_FN void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
FASTGEN_FN void store(double* p, F64 a) { _mm512_storeu_pd(p, a.v); }
// To nearest, ties to even, in integers.
FASTGEN_FN __m256i rounded_to_bf16(F32 a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i high = _mm512_srli_epi32(x, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet));
}
#if defined(__AVX512BF16__)
// The instruction for it takes subnormals for zero, so vectors with an exponent of zero go the longer way.
static __attribute__((noinline)) __m256i small_to_bf16(__m512 a) { return rounded_to_bf16(a); }
FASTGEN_FN __m256i to_bf16(F32 a) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  if (__builtin_expect(_mm512_testn_epi32_mask(_mm512_castps_si512(a.v), exponent) != 0, 0)) return small_to_bf16(a.v);
  return __m256i(_mm512_cvtneps_pbh(a.v));
}
#else
FASTGEN_FN __m256i to_bf16(F32 a) { return rounded_to_bf16(a); }
#endif
FASTGEN_FN void store(BFloat16* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
FASTGEN_FN void store(Float16* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FASTGEN_FN void store(double* p, F32 a) {
  _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
  _mm512_storeu_pd(p + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
}
FASTGEN_FN void store(bool* p, F32 a) {  // 0 or 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// The first `count` lanes, zero in the rest; and their store.
FASTGEN_FN __mmask16 first_mask(int count) { return __mmask16((1u << count) - 1u); }
FASTGEN_FN void load_first(const float* p, int count, F32& out) { out.v = _mm512_maskz_loadu_ps(first_mask(count), p); }
FASTGEN_FN void load_first(const double* p, int count, F64& out) {
  out.v = _mm512_maskz_loadu_pd(__mmask8(first_mask(count)), p);
}
FASTGEN_FN void load_first(const BFloat16* p, int count, F32& out) {
  const __m256i half = _mm256_maskz_loadu_epi16(first_mask(count), p);
  out.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
FASTGEN_FN void load_first(const Float16* p, int count, F32& out) {
  out.v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_mask(count), p));
}
FASTGEN_FN void store_first(float* p, int count, F32 a) { _mm512_mask_storeu_ps(p, first_mask(count), a.v); }
FASTGEN_FN void store_first(double* p, int count, F64 a) { _mm512_mask_storeu_pd(p, __mmask8(first_mask(count)), a.v); }
template <class Half>
FASTGEN_FN void store_first(Half* p, int count, F32 a) {
  alignas(32) Half lanes[16];
  store(lanes, a);
  _mm256_mask_storeu_epi16(p, first_mask(count), _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
}
FASTGEN_FN F32 keep_first(F32 a, int count) { return _mm512_maskz_mov_ps(first_mask(count), a.v); }
FASTGEN_FN F64 keep_first(F64 a, int count) { return _mm512_maskz_mov_pd(__mmask8(first_mask(count)), a.v); }

// Halves added until one lane is left: the order of every instruction set.
FASTGEN_FN float sum(F32 a) {
  const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}
FASTGEN_FN double sum(F64 a) {
  const __m256d by4 = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d by2 = _mm_add_pd(_mm256_castpd256_pd128(by4), _mm256_extractf128_pd(by4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(by2, _mm_unpackhi_pd(by2, by2)));
}
// out[i] = sum(a[i]), in the order of sum: quarters of 128 bits are paired, and the four vectors meet in one.
FASTGEN_FN void sum4(const F32 (&a)[4], float* out) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a[0].v, a[1].v, 0x44),  // two quarters of a, two of b
                                  _mm512_shuffle_f32x4(a[0].v, a[1].v, 0xEE));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(a[2].v, a[3].v, 0x44), _mm512_shuffle_f32x4(a[2].v, a[3].v, 0xEE));
  const __m512 by4 = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  const __m512 by2 = _mm512_add_ps(by4, _mm512_permute_ps(by4, 0x4E));
  const __m512 by1 = _mm512_add_ps(by2, _mm512_permute_ps(by2, 0xB1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, by1)));
}
FASTGEN_FN void sum4(const F64 (&a)[4], double* out) {
  const __m512d ab =
      _mm512_add_pd(_mm512_shuffle_f64x2(a[0].v, a[1].v, 0x44), _mm512_shuffle_f64x2(a[0].v, a[1].v, 0xEE));
  const __m512d cd =
      _mm512_add_pd(_mm512_shuffle_f64x2(a[2].v, a[3].v, 0x44), _mm512_shuffle_f64x2(a[2].v, a[3].v, 0xEE));
  const __m512d by2 = _mm512_add_pd(_mm512_shuffle_f64x2(ab, cd, 0x88), _mm512_shuffle_f64x2(ab, cd, 0xDD));
  const __m512d by1 = _mm512_add_pd(by2, _mm512_permute_pd(by2, 0x55));
  _mm256_storeu_pd(out, _mm512_castpd512_pd256(_mm512_maskz_compress_pd(0x55, by1)));
}

struct Isa {
  static constexpr int kBlocks = 8;
  static constexpr int kChains = 4;  // as many counters as the registers hold at once
  static constexpr int kSums = 24;   // vectors of a product that the registers hold at once
  using U64 = fastgen::U64;
  using F64 = fastgen::F64;
  using U32 = fastgen::U32;
  using F32 = fastgen::F32;
};

FASTGEN_FN U64 count_from(uint64_t first) { return U64(first) + U64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)); }

}  // namespace
}  // namespace fastgen
