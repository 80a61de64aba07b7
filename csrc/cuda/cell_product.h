// The product of a few rows with a matrix that is read once, from where it stands, on the way past the chip:
// out[row][unit] = sum_k matrix[unit][k] x[row][k]. As in recurrent_product.h a tile is kUnits units with kGroups rows
// of the matrix each by kRows rows, and warps share out the sum over k; but matrix and rows both come through the
// rings, with the strides they have in memory. The order of a sum is a matter of the widths alone: no row depends on
// the others.
#pragma once

#include "recurrent_product.h"

namespace fastgen {
namespace {

constexpr int kTileWarps = 4, kTileThreads = 32 * kTileWarps;
static_assert(kTileThreads == kUnits * kRows);  // a thread for each element of a tile

// Rows of adjacent elements. vectors: all of them begin at multiples of 16 bytes, and are as long.
struct MatrixRows {
  const unsigned char* data;
  int64_t pitch, bytes;  // of a row
  bool vectors;

  MatrixRows() = default;
  MatrixRows(const RowsOperand& rows, int64_t width, int64_t element_size)
      : data(static_cast<const unsigned char*>(rows.data)),
        pitch(rows.stride * element_size),
        bytes(width * element_size),
        vectors(reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 16 == 0 && bytes % 16 == 0) {}
};

struct Term {
  MatrixRows matrix, x;
  FASTGEN_MEMBER int chunks() const { return int((matrix.bytes + kChunk - 1) / kChunk); }
};

constexpr int kTileRing = kStages * kStageStreamed;
constexpr int kTileSums = kTileWarps * kTileRing;  // where the sums begin in shared memory
template <int kGroups>
constexpr int kTileBytes = kTileSums + kTileWarps * kGroups * kUnits * kSumPitch * int(sizeof(float));

// A chunk of `count` rows into shared memory by a warp: of row i that with the number row(i), zeros where that is
// negative and behind the ends of rows.
template <class Element, class Row>
__device__ void fetch_rows(const MatrixRows& rows, int count, int chunk, unsigned char* to, const Row& row) {
  constexpr int kParts = kChunk / 16, kElements = 16 / int(sizeof(Element));
  for (int j = int(threadIdx.x) % 32; j < count * kParts; j += 32) {
    const int64_t number = row(j / kParts), at = int64_t(chunk) * kChunk + j % kParts * 16;
    const unsigned char* from = rows.data + (number < 0 ? 0 : number) * rows.pitch;
    unsigned char* part = to + j / kParts * kChunkPitch + j % kParts * 16;
    if (rows.vectors) {
      const bool there = number >= 0 && at < rows.bytes;
      copy_async16(part, from + (there ? at : 0), there);
    } else {
      const int64_t first = at / int64_t(sizeof(Element)), width = rows.bytes / int64_t(sizeof(Element));
      for (int e = 0; e < kElements; ++e) {
        const bool there = number >= 0 && first + e < width;
        reinterpret_cast<Element*>(part)[e] = there ? reinterpret_cast<const Element*>(from)[first + e] : Element{};
      }
    }
  }
}

// The part of one warp in the sums of a tile, to be read by `tile_sum` behind a block_barrier: it is number `warp` of
// the `warps` that share the term. matrix_row(group, unit), x_row(row): numbers of rows, negative where there is none;
// rows: of x, 1 to kRows.
template <class Element, int kGroups, class MatrixRow, class XRow>
__device__ void multiply_term(const Term& term, int warp, int warps, int rows, const MatrixRow& matrix_row,
                              const XRow& x_row) {
  const int own = int(threadIdx.x) / 32;
  const bool many = rows > 8;
  unsigned char* ring = dynamic_shared() + own * kTileRing;
  // Of every chunk a lane copies parts of the same rows of x, so their numbers are looked up once.
  constexpr int kAtOnce = 32 / (kChunk / 16);
  static_assert(2 * kAtOnce == kRows);
  const int of_lane = int(threadIdx.x) % 32 / (kChunk / 16);
  const int64_t number = x_row(of_lane), next = many ? x_row(kAtOnce + of_lane) : -1;
  PartialSums<Element, kGroups> sums;
  through_ring(
      warp, warps, term.chunks(),
      [&](int chunk, int stage) {
        unsigned char* to = ring + stage * kStageStreamed;
        fetch_rows<Element>(term.x, many ? 16 : 8, chunk, to, [&](int i) { return i < kAtOnce ? number : next; });
        fetch_rows<Element>(term.matrix, kGroups * kUnits, chunk, to + kStageOperand,
                            [&](int i) { return matrix_row(i / kUnits, i % kUnits); });
      },
      [&](int, int stage) {
        const unsigned char* of = ring + stage * kStageStreamed;
        sums.add(of + kStageOperand, kChunkPitch, of, many);
      });
  auto* stored = reinterpret_cast<float*>(dynamic_shared() + kTileSums);
  sums.store(stored + own * kGroups * kUnits * kSumPitch, many);
}

// From the warps first to first + warps - 1 of the block.
template <int kGroups>
__device__ float tile_sum(int first, int warps, int group, int unit, int row) {
  const auto* stored = reinterpret_cast<const float*>(dynamic_shared() + kTileSums);
  return sum_of_parts<kGroups>(stored + first * kGroups * kUnits * kSumPitch, warps, group, unit, row);
}

}  // namespace
}  // namespace fastgen
