// Products with a matrix as torch stores it, y[b][j] = sum over k of w[j][k] x[b][k], in dot form: nothing is
// packed, vectors run along k. It serves where there are few rows x and the matrix is read once: a step of a recurrent
// network, the output layer of a generator. Written once over Isa.
//
// An output is one chain of fused multiply-adds over its vectors, in order, and then sum(): its bits depend neither on
// the other rows and outputs that share its tile nor on who computes it.
#pragma once

#include "lanes.inl"

namespace fastgen {
namespace {

// Rows of a matrix, `stride` elements apart; `index` (or null: 0, 1, 2, ...) picks them.
template <class Storage>
struct Rows {
  const Storage* data;
  int64_t stride;
  const int64_t* index;

  FASTGEN_MEMBER const Storage* operator[](int64_t i) const {
    return data + (index == nullptr ? i : index[i]) * stride;
  }
};

template <class Storage>
FASTGEN_FN Rows<Storage> rows_of(const RowsOperand& operand) {
  return {static_cast<const Storage*>(operand.data), operand.stride, operand.index};
}

// One term of a product: w x^T over n columns.
template <class Storage>
struct Term {
  Rows<Storage> w, x;
  int64_t n;
};

// The sizes of a tile: as many accumulators as the registers hold beside its operands. With one row x the matrix is
// read straight from where it lies, and 8 of its rows at a time keep enough reads under way.
constexpr int kDotRows = Isa::kSums / 4;
template <int kRows>
constexpr int kDotOutputs = 8 * kRows <= Isa::kSums ? 8 : 4;

// sum[j][r] += w[j] . x[r] before the lanes are added up.
template <class Storage, int kOutputs, int kRows, class F>
FASTGEN_FN void accumulate(const Storage* const (&w)[kOutputs], const Storage* const (&x)[kRows], int64_t n,
                           F (&sums)[kOutputs][kRows]) {
  constexpr int kWidth = kLanes<typename WorkType<Storage>::T>;
  F a, b[kRows];
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) load(x[r] + k, b[r]);
    FASTGEN_UNROLL
    for (int j = 0; j < kOutputs; ++j) {
      load(w[j] + k, a);
      FASTGEN_UNROLL
      for (int r = 0; r < kRows; ++r) sums[j][r] = multiply_add(a, b[r], sums[j][r]);
    }
  }
  if (k == n) return;
  FASTGEN_UNROLL
  for (int r = 0; r < kRows; ++r) load_first(x[r] + k, int(n - k), b[r]);
  FASTGEN_UNROLL
  for (int j = 0; j < kOutputs; ++j) {
    load_first(w[j] + k, int(n - k), a);
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) sums[j][r] = multiply_add(a, b[r], sums[j][r]);
  }
}

// out[r * stride + j] = the sum of the terms for rows row + r of x and first + j of w, j < count. Whole tiles are
// written: out has room for count rounded up to kMaxDotOutputs. Terms are continued, not added: one chain.
constexpr int kMaxDotOutputs = 8;

template <int kRows, int kTerms, class Storage, class T>
__attribute__((noinline)) void dot_tile_rows(const Term<Storage> (&terms)[kTerms], int64_t row, int64_t first,
                                             int64_t count, T* out, int64_t stride) {
  using F = typename Work<T>::F;
  constexpr int kOutputs = kDotOutputs<kRows>;
  for (int64_t done = 0; done < count; done += kOutputs) {
    F sums[kOutputs][kRows];
    FASTGEN_UNROLL
    for (int j = 0; j < kOutputs; ++j) {
      FASTGEN_UNROLL
      for (int r = 0; r < kRows; ++r) sums[j][r] = F(T(0));
    }
    FASTGEN_UNROLL
    for (int t = 0; t < kTerms; ++t) {
      const Storage *w[kOutputs], *x[kRows];
      FASTGEN_UNROLL
      for (int j = 0; j < kOutputs; ++j) {  // past the last output, the last once more
        w[j] = terms[t].w[first + (done + j < count ? done + j : count - 1)];
      }
      FASTGEN_UNROLL
      for (int r = 0; r < kRows; ++r) x[r] = terms[t].x[row + r];
      accumulate(w, x, terms[t].n, sums);
    }
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTGEN_UNROLL
      for (int j = 0; j < kOutputs; j += 4) {
        const F four[4] = {sums[j][r], sums[j + 1][r], sums[j + 2][r], sums[j + 3][r]};
        sum4(four, out + r * stride + done + j);
      }
    }
  }
}

// The same for `rows` <= kDotRows rows.
template <int kTerms, class Storage, class T>
FASTGEN_FN void dot_tile(const Term<Storage> (&terms)[kTerms], int64_t row, int64_t rows, int64_t first, int64_t count,
                         T* out, int64_t stride) {
  switch (rows) {
    case 1: return dot_tile_rows<1>(terms, row, first, count, out, stride);
    case 2: return dot_tile_rows<2>(terms, row, first, count, out, stride);
  }
  if constexpr (kDotRows > 2) {
    if (rows == 3) return dot_tile_rows<3>(terms, row, first, count, out, stride);
  }
  if constexpr (kDotRows > 3) {
    switch (rows) {
      case 4: return dot_tile_rows<4>(terms, row, first, count, out, stride);
      case 5: return dot_tile_rows<5>(terms, row, first, count, out, stride);
      case 6: return dot_tile_rows<6>(terms, row, first, count, out, stride);
    }
  }
}

}  // namespace
}  // namespace fastgen
