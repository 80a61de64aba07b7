// vec_avx512.h and products of bfloat16, two at a time, summed in float. Needs AVX-512 BF16.
//
// vdpbf16ps treats subnormals as zero and rounds each of its two additions to nearest, whatever the thread's mode.
#pragma once

#include "vec_avx512.h"
// After Isa:
#include "product.inl"

namespace fastgen {
namespace {

// Places of words: first + i and first + i + distance, for i from 0 to 15.
FASTGEN_FN __m512i word_pairs(int first, int distance) {
  const __m512i columns = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Of both halves of an element the same number, and the distance in the upper one.
  return _mm512_add_epi32(_mm512_mullo_epi32(columns, _mm512_set1_epi32(0x10001)),
                          _mm512_set1_epi32(first * 0x10001 + (distance << 16)));
}

// Two vectors in bfloat16, one behind the other.
FASTGEN_FN __m512i round_both(F32 first, F32 second) { return __m512i(_mm512_cvtne2ps_pbh(second.v, first.v)); }

// The arithmetic of a product (see Multiply in product.inl) on pairs of the depth: a lane of F holds two elements.
struct MultiplyPairs {
  using T = float;
  using F = F32;
  using Left = BFloat16;
  using Right = BFloat16;
  static constexpr int kDepth = 2;

  static FASTGEN_MEMBER F spread(const Left* left) {
    float pair;
    memcpy(&pair, left, sizeof pair);
    return F(pair);
  }
  static FASTGEN_MEMBER void load_right(const Right* right, F& out) { out.v = _mm512_loadu_ps(right); }
  static FASTGEN_MEMBER F step(F left, F right, F sum) {
    return _mm512_dpbf16_ps(sum.v, __m512bh(left.v), __m512bh(right.v));
  }

  static FASTGEN_MEMBER void put_step(const F (&rows)[kDepth], BFloat16* out) {
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(word_pairs(0, 16), round_both(rows[0], rows[1])));
  }
  static FASTGEN_MEMBER void put_rows(const F (&rows)[kDepth], BFloat16* out, int64_t stride) {
    const __m512i rounded = round_both(rows[0], rows[1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(rounded));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + stride), _mm512_extracti64x4_epi64(rounded, 1));
  }
  static FASTGEN_MEMBER void copy_step(const BFloat16* const (&rows)[kDepth], int count, BFloat16* out) {
    const __mmask16 mask = first_mask(count);
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[0]));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows[1] == nullptr ? 0 : mask, rows[1]));
    _mm512_storeu_si512(out, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
  // The transposition moves pairs as it moves floats: bits only.
  static FASTGEN_MEMBER void pack(const BFloat16* const (&rows)[kLanes<T>], int64_t depth, int64_t step, Right* out) {
    F square[16];
    for (int64_t k = 0; k < depth; k += 32) {
      const int64_t left = depth - k;
      const __mmask32 mask = left < 32 ? __mmask32((1u << left) - 1u) : __mmask32(-1);
      for (int i = 0; i < 16; ++i) {
        square[i] = rows[i] == nullptr ? F(0.0f) : F(_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, rows[i] + k)));
      }
      transpose(square);
      for (int i = 0; i < 16 && 2 * i < left; ++i) _mm512_storeu_ps(out + (k + 2 * i) * step, square[i].v);
    }
  }
  // Rows 2i and 2i + 1 as pairs, [rows / 2][out_row][2], with zeros for a row or a column that is not there; element
  // (r, k) stands at from[r * row + k * step].
  static __attribute__((noinline)) void pair_rows(const BFloat16* from, int64_t row, int64_t step, int64_t rows,
                                                  int64_t width, BFloat16* out, int64_t out_row) {
    const auto take_row = [&](const BFloat16* at, int64_t k) {
      const int64_t left = width - k;
      if (step == 1) return _mm512_maskz_loadu_epi16(left >= 32 ? __mmask32(-1) : __mmask32((1u << left) - 1u), at + k);
      alignas(64) BFloat16 words[32] = {};
      for (int64_t i = 0; i < at_most(left, 32); ++i) words[i] = at[(k + i) * step];
      return _mm512_load_si512(words);
    };
    const __m512i first = word_pairs(0, 32), second = word_pairs(16, 32);
    for (int64_t r = 0; r < rows; r += 2, from += 2 * row, out += 2 * out_row) {
      for (int64_t k = 0; k < width; k += 32) {
        const __m512i even = take_row(from, k), odd = r + 1 < rows ? take_row(from + row, k) : _mm512_setzero_si512();
        _mm512_storeu_si512(out + 2 * k, _mm512_permutex2var_epi16(even, first, odd));
        if (k + 16 < out_row) _mm512_storeu_si512(out + 2 * k + 32, _mm512_permutex2var_epi16(even, second, odd));
      }
    }
  }
  static FASTGEN_MEMBER void copy_row(const BFloat16* from, int64_t count, Left* out) {
    memcpy(out, from, size_t(count) * sizeof *from);
    if (count % 2 != 0) out[count] = {};
  }
};

}  // namespace
}  // namespace fastgen
