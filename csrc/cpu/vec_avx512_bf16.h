// vec_avx512.h and products of bfloat16, two at a time, summed in float. Needs AVX-512 BF16.
//
// vdpbf16ps treats subnormals as zero and rounds each of its two additions to nearest, whatever the thread's mode.
#pragma once

#include "vec_avx512.h"
// After Isa:
#include "product.inl"

namespace fastgen {
namespace {

FASTGEN_FN F32 round_to_pairs(F32 even, F32 odd) {
  const __m512i low = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(even.v)));
  const __m512i high = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(odd.v)));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

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
    _mm512_storeu_ps(out, round_to_pairs(rows[0], rows[1]).v);
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
      if (step == 1) {
        const int64_t left = width - k;
        const __mmask16 mask = left >= 16 ? __mmask16(-1) : __mmask16((1u << left) - 1u);
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at + k));
      }
      alignas(64) uint32_t bits[16] = {};
      for (int64_t i = k; i < k + 16 && i < width; ++i) memcpy(bits + (i - k), at + i * step, sizeof *at);
      return _mm512_load_si512(bits);
    };
    for (int64_t r = 0; r < rows; r += 2, from += 2 * row, out += 2 * out_row) {
      for (int64_t k = 0; k < out_row; k += 16) {
        const __m512i even = take_row(from, k), odd = r + 1 < rows ? take_row(from + row, k) : _mm512_setzero_si512();
        _mm512_storeu_si512(out + 2 * k, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
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
