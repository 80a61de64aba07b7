// The product of a step with a matrix that stays on the chip: out[row][unit] = sum_k matrix[unit][k] operand[row][k],
// for the rows of the batch at that step.
//
// A tile is kUnits units by kRows rows. The warps of its block share out the sum over k, a chunk of kChunk bytes of
// every row at a time, each through a ring of its own: they need not wait for each other, and the first multiplies
// while the operand of the last is on its way from L2. Their sums stand in shared memory behind each other and are
// added in that order: the result does not depend on timing.
//
// In a cluster of blocks, which as many tiles belong to, the blocks share out the chunks instead, each for all these
// tiles: a warp a tile. So a block reads its part of the operand alone, and each warp stores its sums in the shared
// memory of the block whose tile it had, where they stand and are added as the warps' sums do otherwise: the bits are
// the same.
//
// A unit has kGroups rows of the matrix (the gates of W_hh), which are multiplied with the same operand. Halves go
// through the tensor cores, the matrix as the left side (16 rows: two groups) and the rows of the batch as columns.
//
// Of a layer that runs beside the one below the operand has two sides, its own h and the h of that layer, and so the
// matrix has [W_hh | W_ih]. Each side has one half of the warps and sums of its own.
#pragma once

#include "device.h"

namespace fastgen {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kUnits = 8, kRows = 16;
constexpr int kChunk = 64;                // bytes of a row
constexpr int kChunkPitch = kChunk + 16;  // in shared memory: eight rows begin in eight different sets of four banks
constexpr int kStages = 4;                // chunks of a warp on their way
constexpr int kSumPitch = 24;             // floats: the pairs of a quarter of a warp fall into different banks
constexpr int kGroupsMost = 4;
constexpr int kCluster = kWarps;  // blocks of a cluster

// Where everything stands in the shared memory of a block: resident tiles, rings, sums.
struct SharedPlan {
  int warps;                      // that multiply
  int rings, stage, sums, bytes;  // stage: bytes of a chunk of the operand, and of the matrix where it is streamed
};

// The matrix in tiles, [tiles][groups][kUnits][pitch], padded with zeros to whole tiles and chunks, and the operand,
// [2][batch][chunks * kChunk bytes], padded likewise: a step reads one half of it while the next one is written. Of two
// sides the other one's operand is the same again; the layer below writes its half one step ahead.
struct Product {
  const unsigned char* matrix;
  unsigned char *operand, *below;
  int64_t units, width, batch;       // of the result, of the sum of a side, of the operand
  int sides, groups, chunks, tiles;  // chunks: of a side
  int tiles_of_block;                // each block has as many, but for the last ones
  int shared;     // where the tiles of a block stand in its shared memory; -1: they are read from L2 at each step
  bool clusters;  // a block has a part of the chunks of all tiles of its cluster; of one group

  FASTGEN_MEMBER int64_t operand_pitch() const { return int64_t(chunks) * kChunk; }
  // Eight rows at this distance begin in different banks, as in a chunk.
  FASTGEN_MEMBER int64_t pitch() const { return sides * operand_pitch() + 16; }
  FASTGEN_MEMBER int64_t tile_bytes() const { return groups * kUnits * pitch(); }
  // Of a row, tile and block that has a part of the chunks.
  FASTGEN_MEMBER int part_chunks() const { return (chunks + kCluster - 1) / kCluster; }
  FASTGEN_MEMBER int64_t part_pitch() const { return int64_t(part_chunks()) * kChunk + 16; }
  FASTGEN_MEMBER int64_t part_bytes() const { return kUnits * part_pitch(); }
  FASTGEN_MEMBER int64_t resident_bytes() const {
    return tiles_of_block * (clusters ? kCluster * part_bytes() : tile_bytes());
  }
  // Whether the rings hold all chunks of a tile of rows, for all tiles of the matrix that a block has.
  FASTGEN_MEMBER bool stays(const SharedPlan& plan) const {
    return shared >= 0 && (clusters || chunks * sides <= kStages * plan.warps);
  }
  FASTGEN_MEMBER int first_tile(int block) const { return block * tiles_of_block; }
  FASTGEN_MEMBER int end_tile(int block) const {
    const int end = (block + 1) * tiles_of_block;
    return end < tiles ? end : tiles;
  }
  template <class Element>
  FASTGEN_MEMBER Element* operand_row(int64_t half, int64_t row) const {
    return reinterpret_cast<Element*>(operand + (half * batch + row) * operand_pitch());
  }
  // A row as a step reads it that has `half` of its own side.
  FASTGEN_MEMBER const unsigned char* side_row(int side, int64_t half, int64_t row) const {
    return side == 0 ? operand + (half * batch + row) * operand_pitch()
                     : below + ((1 - half) * batch + row) * operand_pitch();
  }
};

constexpr int kStageOperand = kRows * kChunkPitch;
constexpr int kStageStreamed = kStageOperand + kGroupsMost * kUnits * kChunkPitch;
constexpr int kWarpsStreamed = 4;  // with rings of three times the size: as many bytes on their way, in 99 KB

template <class Element>
struct PackParams {
  const Element *source, *below;              // of the two sides
  int64_t group_stride, unit_stride, stride;  // of a source, in elements
  Product product;
};

// A block has the kUnits rows of one group of one tile, a warp each: where the columns of the source become rows, those
// of a block are neighbours in it.
template <class Element>
__global__ void pack_kernel(PackParams<Element> p) {
  static_assert(kWarps == kUnits);
  const Product& product = p.product;
  const int tile = int(blockIdx.x) / product.groups, group = int(blockIdx.x) % product.groups;
  const int row = int(threadIdx.x) / 32;
  const int64_t unit = int64_t(tile) * kUnits + row, pitch = product.pitch() / int64_t(sizeof(Element));
  const int64_t side_pitch = product.operand_pitch() / int64_t(sizeof(Element));
  auto* to = reinterpret_cast<Element*>(const_cast<unsigned char*>(product.matrix)) +
             (int64_t(blockIdx.x) * kUnits + row) * pitch;
  for (int side = 0; side < product.sides; ++side, to += side_pitch) {
    const Element* from = (side == 0 ? p.source : p.below) + group * p.group_stride + unit * p.unit_stride;
    // Zeros behind the last side, too.
    const int64_t end = side + 1 < product.sides ? side_pitch : pitch - side * side_pitch;
    for (int64_t k = threadIdx.x % 32; k < end; k += 32) {
      to[k] = k < product.width && unit < product.units ? from[k * p.stride] : Element{};
    }
  }
}

// The same of a block that has chunks rank, rank + kCluster, ... of the tiles of its cluster: [tiles][kUnits], those of
// one of its blocks behind those of another.
__device__ inline void load_part(const Product& product, int block) {
  const int rank = block % kCluster, first = product.first_tile(block - rank);
  const int width = product.part_chunks() * (kChunk / 16);  // of a row, in copies
  for (int j = int(threadIdx.x); j < kCluster * product.tiles_of_block * kUnits * width; j += kThreads) {
    const int row = j / width, place = j % width / (kChunk / 16), part = j % (kChunk / 16) * 16;
    const int chunk = rank + place * kCluster, tile = first + row / kUnits;
    if (tile >= product.tiles || chunk >= product.chunks) continue;
    copy_async16(dynamic_shared() + product.shared + row * product.part_pitch() + place * kChunk + part,
                 product.matrix + (int64_t(first) * kUnits + row) * product.pitch() + int64_t(chunk) * kChunk + part);
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// Brings the tiles of a block into its shared memory, where they stay. A barrier must follow.
__device__ inline void load_resident(const Product& product, int block) {
  if (product.shared < 0) return;
  if (product.clusters) return load_part(product, block);
  const int first = product.first_tile(block), end = product.end_tile(block);
  const int64_t bytes = (end - first) * product.tile_bytes();
  for (int64_t i = int64_t(threadIdx.x) * 16; i < bytes; i += kThreads * 16) {
    copy_async16(dynamic_shared() + product.shared + i, product.matrix + first * product.tile_bytes() + i);
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// What a thread holds of the sums of its warp.
template <class Element, int kGroups>
struct PartialSums {
  static constexpr int kPairs = (kGroups + 1) / 2;  // of groups: the rows of a product of tensor cores
  float d[kPairs][2][4] = {};

  // `left` and `right`: the chunk of the matrix and of the operand.
  __device__ void add(const unsigned char* left, int64_t pitch, const unsigned char* right, bool many) {
    const int lane = threadIdx.x % 32, row = lane % 8, part = lane / 8;
    uint32_t b[2][4] = {};
    load_matrices(b[0], right + row * kChunkPitch + part * 16);
    if (many) load_matrices(b[1], right + (8 + row) * kChunkPitch + part * 16);
    FASTGEN_UNROLL
    for (int k = 0; k < 2; ++k) {
      FASTGEN_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        // A group that does not exist repeats the one before: its sums are dropped.
        const int group = pair * 2 + part % 2 < kGroups ? pair * 2 + part % 2 : kGroups - 1;
        uint32_t a[4];
        load_matrices(a, left + (group * kUnits + row) * pitch + (2 * k + part / 2) * 16);
        const uint32_t few[] = {b[0][2 * k], b[0][2 * k + 1]}, more[] = {b[1][2 * k], b[1][2 * k + 1]};
        fastgen::multiply_add<Element>(d[pair][0], a, few);
        if (many) fastgen::multiply_add<Element>(d[pair][1], a, more);
      }
    }
  }

  __device__ void store(float* sums, bool many) const {
    const int lane = threadIdx.x % 32;
    FASTGEN_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      float* row = sums + (group * kUnits + lane / 4) * kSumPitch + 2 * (lane % 4);
      const float (&of)[2][4] = d[group / 2];
      *reinterpret_cast<float2*>(row) = {of[0][group % 2 * 2], of[0][group % 2 * 2 + 1]};
      if (many) *reinterpret_cast<float2*>(row + 8) = {of[1][group % 2 * 2], of[1][group % 2 * 2 + 1]};
    }
  }
};

template <int kGroups>
struct PartialSums<float, kGroups> {
  float d[kGroups][4] = {};  // of unit lane % 8 and the rows lane / 8 + 4 j

  __device__ void add(const unsigned char* left, int64_t pitch, const unsigned char* right, bool many) {
    const int lane = threadIdx.x % 32;
    FASTGEN_UNROLL
    for (int k = 0; k < kChunk; k += 16) {
      float4 a[kGroups];
      FASTGEN_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        a[group] = *reinterpret_cast<const float4*>(left + (group * kUnits + lane % 8) * pitch + k);
      }
      FASTGEN_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (j >= 2 && !many) continue;
        const float4 b = *reinterpret_cast<const float4*>(right + (j * 4 + lane / 8) * kChunkPitch + k);
        FASTGEN_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          float& sum = d[group][j];
          sum = a[group].x * b.x + sum;
          sum = a[group].y * b.y + sum;
          sum = a[group].z * b.z + sum;
          sum = a[group].w * b.w + sum;
        }
      }
    }
  }

  __device__ void store(float* sums, bool many) const {
    const int lane = threadIdx.x % 32;
    FASTGEN_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      FASTGEN_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (j < 2 || many) sums[(group * kUnits + lane % 8) * kSumPitch + j * 4 + lane / 8] = d[group][j];
      }
    }
  }
};

// Runs one warp through the chunks first, first + step, ..., each by way of the next stage of its ring:
// fetch(chunk, stage) begins copies, use(chunk, stage) finds what they brought.
template <class Fetch, class Use>
__device__ void through_ring(int first, int step, int chunks, const Fetch& fetch, const Use& use) {
  const auto ahead = [&](int chunk, int stage) {
    if (chunk < chunks) fetch(chunk, stage);
    copy_async_commit();
  };
  FASTGEN_UNROLL
  for (int i = 0; i < kStages; ++i) ahead(first + i * step, i);
  int stage = 0;
  for (int chunk = first; chunk < chunks; chunk += step) {
    copy_async_wait<kStages - 1>();
    warp_barrier();
    use(chunk, stage);
    warp_barrier();
    ahead(chunk + kStages * step, stage);
    stage = (stage + 1) % kStages;
  }
}

// The sums of one tile, to be read by `sum_of` behind a block_barrier, of `rows` rows, 1 to kRows, of which `b` is the
// first. The tiles of a block come in their order for each of the row tiles. kSides: the most that the product may
// have.
template <class Element, int kGroups, int kSides>
__device__ void multiply_tile(const Product& product, int tile, int block, int64_t half, int64_t b, int rows,
                              const SharedPlan& plan) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps = kSides == 1 ? plan.warps : plan.warps / product.sides;  // of a side
  const int side = kSides == 1 ? 0 : warp / warps, first = kSides == 1 ? warp : warp % warps;
  if (warp >= plan.warps || first >= product.chunks) return;
  const bool streamed = product.shared < 0, many = rows > 8;
  const unsigned char* matrix =
      streamed ? product.matrix + tile * product.tile_bytes()
               : dynamic_shared() + product.shared + (tile - product.first_tile(block)) * product.tile_bytes();
  const int64_t pitch = product.pitch(), operand_pitch = product.operand_pitch();
  const unsigned char* operand = product.side_row(side, half, b);
  matrix += side * operand_pitch;
  unsigned char* ring = dynamic_shared() + plan.rings + warp * kStages * plan.stage;

  const auto fetch = [&](int chunk, int stage) {
    const int64_t at = int64_t(chunk) * kChunk;
    unsigned char* to = ring + stage * plan.stage;
    for (int j = lane; j < (many ? 16 : 8) * (kChunk / 16); j += 32) {
      const int row = j / (kChunk / 16), part = j % (kChunk / 16) * 16;
      const bool there = row < rows;
      copy_async16(to + row * kChunkPitch + part, operand + (there ? row : 0) * operand_pitch + at + part, there);
    }
    for (int j = lane; streamed && j < kGroups * kUnits * (kChunk / 16); j += 32) {
      const int row = j / (kChunk / 16), part = j % (kChunk / 16) * 16;
      copy_async16(to + kStageOperand + row * kChunkPitch + part, matrix + row * pitch + at + part);
    }
  };
  PartialSums<Element, kGroups> sums;
  const auto use = [&](int chunk, int stage) {
    const unsigned char* of = ring + stage * plan.stage;
    if (streamed) {
      sums.add(of + kStageOperand, kChunkPitch, of, many);
    } else {
      sums.add(matrix + int64_t(chunk) * kChunk, pitch, of, many);
    }
  };
  if (tile > product.first_tile(block) && product.stays(plan)) {
    for (int i = 0; first + i * warps < product.chunks; ++i) use(first + i * warps, i);
  } else {
    through_ring(first, warps, product.chunks, fetch, use);
  }
  sums.store(reinterpret_cast<float*>(dynamic_shared() + plan.sums) + warp * kGroups * kUnits * kSumPitch, many);
}

// The part of a block in the sums of tile number `i` of each block of its cluster, to be read by `sum_of` behind a
// cluster_barrier. The block's part of the operand stands in place of the rings from the first tile to the last.
template <class Element>
__device__ void multiply_part(const Product& product, int i, int block, const unsigned char* operand, int rows,
                              const SharedPlan& plan) {
  const int warp = threadIdx.x / 32, rank = block % kCluster, row_parts = kChunk / 16;
  const bool many = rows > 8;
  unsigned char* own = dynamic_shared() + plan.rings;
  const int width = (many ? 16 : 8) * row_parts;  // of a chunk, in copies
  for (int j = int(threadIdx.x); i == 0 && j < product.part_chunks() * width; j += kThreads) {
    const int place = j / width, row = j % width / row_parts, part = j % row_parts * 16;
    const int chunk = rank + place * kCluster;
    const bool there = row < rows && chunk < product.chunks;
    copy_async16(own + place * kStageOperand + row * kChunkPitch + part,
                 operand + (there ? row * product.operand_pitch() + int64_t(chunk) * kChunk + part : 0), there);
  }
  copy_async_commit();
  copy_async_wait<0>();
  block_barrier();
  const int owner = block - rank + warp, tile = product.first_tile(owner) + i;
  if (tile >= product.end_tile(owner) || rank >= product.chunks) return;
  const unsigned char* matrix =
      dynamic_shared() + product.shared + (warp * product.tiles_of_block + i) * product.part_bytes();
  PartialSums<Element, 1> sums;
  for (int place = 0; rank + place * kCluster < product.chunks; ++place) {
    sums.add(matrix + place * kChunk, product.part_pitch(), own + place * kStageOperand, many);
  }
  auto* parts = reinterpret_cast<float*>(dynamic_shared() + plan.sums);
  sums.store(in_block_of_cluster(parts, warp) + rank * kUnits * kSumPitch, many);
}

// The sum of the parts that several warps have stored, in their order.
template <int kGroups>
__device__ float sum_of_parts(const float* sums, int parts, int group, int unit, int row) {
  sums += (group * kUnits + unit) * kSumPitch + row;
  float total = 0;
  for (int i = 0; i < parts; ++i) total = total + sums[i * kGroups * kUnits * kSumPitch];
  return total;
}

template <int kGroups, int kSides>
__device__ float sum_of(const Product& product, const SharedPlan& plan, int side, int group, int unit, int row) {
  const auto* sums = reinterpret_cast<const float*>(dynamic_shared() + plan.sums);
  const int most = product.clusters ? kCluster : kSides == 1 ? plan.warps : plan.warps / product.sides;
  if (kSides > 1) sums += side * most * kGroups * kUnits * kSumPitch;
  return sum_of_parts<kGroups>(sums, product.chunks < most ? product.chunks : most, group, unit, row);
}

}  // namespace
}  // namespace fastgen
