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
  static FASTGEN_MEMBER void copy_row(const BFloat16* from, int64_t count, Left* out) {
    memcpy(out, from, size_t(count) * sizeof *from);
    if (count % 2 != 0) out[count] = {};
  }
};

}  // namespace
}  // namespace fastgen
