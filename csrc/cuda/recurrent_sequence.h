// What the kernels of both directions share: their parameters, and the part of a thread in the steps of a sequence.
#pragma once

#include "recurrent_cell.h"
#include "recurrent_product.h"

namespace fastgen {
namespace {

// What the kernels of both directions have in common. The pointers of batch_sizes and step_rows are the device's.
template <class Params>
struct Sequence : Params {
  Product recurrent;   // forward: W_hh, of h; backward: its transpose, of the gradients of the gates
  Product projection;  // forward: W_hr, of o tanh(c'); backward: its transpose, of dh
  SharedPlan shared;
  // Blocks that share the units of a layer, for one of so many groups of rows. Of layers that run at once there are as
  // many for each of `stages`, which have one or several of these layers.
  int unit_blocks, stages, groups;
  Zone zone_c, zone_h;
  const int64_t* seed_offset;  // null: nothing is drawn
  float *h, *c;                // [batch][P], [batch][H]: states from step to step, backward the gradients of them
  uint32_t* arrived;           // [groups][kLine]: each group has a barrier of its own

  FASTGEN_MEMBER int blocks_of_group() const { return unit_blocks * stages; }
};
constexpr int kLine = 32;  // counters of different groups stand in different cache lines

template <class Params>
__device__ GridBarrier barrier_of(const Sequence<Params>& p) {
  return {p.arrived + int(blockIdx.x) / p.blocks_of_group() * kLine, p.blocks_of_group()};
}

// The place of a step in the sequence: its rows of the batch, and the number of the first of them.
struct Step {
  int64_t t, rows, first;
};

FASTGEN_FN Step step_of(const RecurrentParams& p, int64_t s) {
  const int64_t t = p.reverse ? p.steps - 1 - s : s;
  if (p.batch_sizes == nullptr) return {t, p.batch, t * p.row_step};
  return {t, p.batch_sizes[t], p.step_rows[t]};
}
FASTGEN_FN int64_t row_of(const RecurrentParams& p, const Step& step, int64_t b) {
  return step.first + b * p.row_batch;
}

// The part of a thread in both directions.
template <class Params>
struct Worker {
  const Params& p;
  GridBarrier& barrier;
  const int block, group;  // of units, of rows
  const int unit, row;     // of a tile
  const bool owner;        // of an element of it

  __device__ Worker(const Params& p, GridBarrier& barrier)
      : p(p),
        barrier(barrier),
        block(int(blockIdx.x) % p.unit_blocks),
        group(int(blockIdx.x) / p.blocks_of_group()),
        unit(int(threadIdx.x) % kUnits),
        row(int(threadIdx.x) / kUnits),
        owner(int(threadIdx.x) < kUnits * kRows) {}

  // body(tile, b) for the tiles of this block among the first `rows` rows, the first of which is b.
  template <class Body>
  __device__ void tiles(const Product& product, int64_t rows, const Body& body) const {
    for (int64_t b = int64_t(group) * kRows; b < rows; b += int64_t(p.groups) * kRows) {
      for (int tile = product.first_tile(block); tile < product.end_tile(block); ++tile) body(tile, b);
    }
  }
  // body(b, u) for this thread's rows and units of a result.
  template <class Body>
  __device__ void elements(const Product& product, int64_t rows, const Body& body) const {
    tiles(product, rows, [&](int tile, int64_t b) {
      const int64_t u = int64_t(tile) * kUnits + unit;
      if (owner && b + row < rows && u < product.units) body(b + row, u);
    });
  }
  // body(b, u, valid, tile) for whole warps, of which all that are not `valid` only take part in shuffles.
  template <class Body>
  __device__ void warps(const Product& product, int64_t rows, const Body& body) const {
    tiles(product, rows, [&](int tile, int64_t b) {
      const int64_t u = int64_t(tile) * kUnits + unit;
      if (owner) body(b + row, u, b + row < rows && u < product.units, tile);
    });
  }
  // The same with the sums of the product with the first `fed` rows of `half` of the operand, zero for rows behind
  // them: body(b, u, valid, tile, sums, ahead), where ahead = fetch(b, u, valid) is read from memory while the product
  // runs. kSides: as of multiply_tile; the sums of one side stand behind those of the other, zero where there is none.
  template <class Element, int kGroups, int kSides = 1, class Fetch, class Body>
  __device__ void multiply(const Product& product, int64_t half, int64_t fed, int64_t rows, const Fetch& fetch,
                           const Body& body) const {
    // The element of this thread in a tile, whose sums are there behind `multiply(operand, rows)` and `meet()`.
    const auto one = [&](int tile, int64_t b, const auto& multiply, const auto& meet) {
      const int64_t left = fed - b, u = int64_t(tile) * kUnits + unit;
      const bool valid = owner && b + row < rows && u < product.units;
      const auto ahead = fetch(b + row, u, valid);
      if (left > 0) {
        multiply(b, int(left < kRows ? left : kRows));
        meet();
      }
      if (!owner) return;
      float sums[kSides * kGroups];
      FASTGEN_UNROLL
      for (int i = 0; i < kSides * kGroups; ++i) {
        const int side = i / kGroups;
        const bool there = row < left && (side == 0 || product.sides > 1);
        sums[i] = there ? sum_of<kGroups, kSides>(product, p.shared, side, i % kGroups, unit, row) : 0.0f;
      }
      body(b + row, u, valid, tile, sums, ahead);
    };
    if constexpr (kGroups == 1 && kSides == 1) {
      if (product.clusters) return in_clusters<Element>(product, half, rows, one);
    }
    tiles(product, rows, [&](int tile, int64_t b) {
      const auto multiply = [&](int64_t b, int count) {
        multiply_tile<Element, kGroups, kSides>(product, tile, block, half, b, count, p.shared);
      };
      one(tile, b, multiply, [] { block_barrier(); });
      block_barrier();
    });
  }
  // As many tiles as the other blocks of the cluster, whether they are there or not. The sums of one are read before
  // another block writes those of the next, or, of the last, before it comes past the barrier of the grid.
  template <class Element, class One>
  __device__ void in_clusters(const Product& product, int64_t half, int64_t rows, const One& one) const {
    bool first = true;
    for (int64_t b = int64_t(group) * kRows; b < rows; b += int64_t(p.groups) * kRows) {
      for (int i = 0; i < product.tiles_of_block; ++i) {
        const auto multiply = [&](int64_t b, int count) {
          if (!first) cluster_barrier();
          multiply_part<Element>(product, i, block, product.side_row(0, half, b), count, p.shared);
          first = false;
        };
        one(product.first_tile(block) + i, b, multiply, [] { cluster_barrier(); });
      }
    }
  }
  __device__ int units_of(const Product& product, int tile) const {
    const int64_t left = product.units - int64_t(tile) * kUnits;
    return int(left < kUnits ? left : kUnits);
  }
};

}  // namespace
}  // namespace fastgen
