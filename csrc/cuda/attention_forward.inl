// The forward pass of attention (Dao, "FlashAttention-2: faster attention with better parallelism and work
// partitioning", 2023): a block has a tile of query rows and walks over the keys that they see, tile by tile; scores,
// weights and the running maximum and sum of each row stay in registers.
//
// Rows of a tile are those of one head or, where there are few queries, of all the heads that read one key head, so
// that a tile of keys serves all of them. And where there are too few tiles of queries to fill the device, the keys of
// each are split over several blocks, whose sums another kernel joins.
#pragma once

#include "attention_forward.h"

namespace fastgen {
namespace {

// Queries are held in registers, and there are two stages of keys and values, one of which arrives while the other is
// worked on. Where registers are full of sums, queries stay in shared memory, and there is room for one stage: values
// arrive while their keys are worked on, and keys while the values before them are.
template <int kWidth, int kFragments>
constexpr bool kHoldsQueries = kFragments * kWidth <= 128;

constexpr int kMostRows = 128;  // of a block

template <int kWidth, int kFragments>
constexpr size_t kForwardShared =
    sizeof(uint16_t) * size_t((kHoldsQueries<kWidth, kFragments> ? 4 * kTileKeys : 2 * kTileKeys + kMostRows) * kWidth);

// With extras a warp always has one fragment. Blocks whose warps have two have all these threads.
template <bool kExtras>
constexpr int kMostThreads = kExtras ? 256 : 128;

// Of a multiprocessor, at least: so many registers are left to a thread.
template <int kWidth, int kFragments, bool kExtras>
constexpr int kLeastBlocks = kExtras                           ? 1
                             : kWidth == 64 && kFragments == 1 ? 3
                                                               : 2;

template <class T, int kWidth, int kFragments, bool kExtras>
__global__ void __launch_bounds__(kMostThreads<kExtras>, kLeastBlocks<kWidth, kFragments, kExtras>)
    attention_kernel(const ForwardCall c) {
  constexpr int kSteps = kWidth / 16, kStage = 2 * kTileKeys * kWidth;
  constexpr bool kHolds = kHoldsQueries<kWidth, kFragments>;
  static_assert(kStage >= kMostRows * kWidth, "queries that are held, and later results, stand where a stage does");
  T* const shared = reinterpret_cast<T*>(dynamic_shared());
  T* const queries = shared + kStage;
  const Unit u = unit_of(c, blockIdx.x, int(blockIdx.y), kTileKeys);
  const Sequence& s = u.sequence;
  const Rows<T> key = rows_of<T>(c.key, s.number, u.kv_head, s.key_start, c.width);
  const Rows<T> value = rows_of<T>(c.value, s.number, u.kv_head, s.key_start, c.value_width);
  constexpr int kThreads = kFragments > 1 ? kMostThreads<kExtras> : 0;
  const auto load_keys = [&](int first, T* stage) {
    load_tile<T, kWidth, kThreads>(stage, key, first, kTileKeys, s.keys);
  };
  const auto load_values = [&](int first, T* stage) {
    load_tile<T, kWidth, kThreads>(stage + kTileKeys * kWidth, value, first, kTileKeys, s.keys);
  };
  const auto arrive = [] {
    copy_async_commit();
    copy_async_wait<0>();
  };

  constexpr int kWarpRows = 16 * kFragments;
  const int first_row = int(threadIdx.x) / 32 * kWarpRows, end_row = smaller_int(first_row + kWarpRows, u.count);
  const Range of_warp = queries_of(c, u, u.first + first_row, u.first + end_row);
  const Range seen = seen_keys(c, s, of_warp.begin, of_warp.end);
  const float factor = kExtras ? 1.0f : c.product_scale;
  Fragment<T, kWidth, kExtras> fragment[kFragments];
  FASTGEN_UNROLL
  for (int f = 0; f < kFragments; ++f) fragment[f].start(first_row + 16 * f);

  uint32_t query[kHolds ? kSteps : 1][kFragments][4];
  const auto load_query = [&](int k, uint32_t (&to)[kFragments][4]) {
    FASTGEN_UNROLL
    for (int f = 0; f < kFragments; ++f) load_left<T, kWidth>(to[f], queries, first_row + 16 * f, k * 16);
  };
  if (u.keys.begin < u.keys.end) {
    load_queries<T, kWidth>(queries, c, u, int(blockDim.x) / 32 * kWarpRows);
    load_keys(u.keys.begin, shared);
    if constexpr (kHolds) {
      load_values(u.keys.begin, shared);
      arrive();
      block_barrier();
      FASTGEN_UNROLL
      for (int k = 0; k < kSteps; ++k) load_query(k, query[k]);
    }
  }
  for (int j = u.keys.begin, stage = 0; j < u.keys.end; j += kTileKeys, stage ^= int(kHolds)) {
    T* const keys = shared + stage * kStage;
    T* const next = shared + (kHolds ? stage ^ 1 : 0) * kStage;
    const bool more = j + kTileKeys < u.keys.end;
    const bool works = first_row < end_row && j < seen.end && j + kTileKeys > seen.begin;
    arrive();
    block_barrier();  // these keys are there, and nobody reads what stood where others go now
    if constexpr (!kHolds) {
      load_values(j, keys);
    } else if (more) {
      load_keys(j + kTileKeys, next);
      load_values(j + kTileKeys, next);
    }
    if (works) {
      FASTGEN_UNROLL
      for (int f = 0; f < kFragments; ++f) fragment[f].clear(fragment[f].score);
      FASTGEN_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        if constexpr (!kHolds) load_query(k, query[0]);
        FASTGEN_UNROLL
        for (int n = 0; n < kPairs; ++n) {
          uint32_t right[2][2];
          load_right_of_rows<T, kWidth>(right, keys, n * 16, k * 16);
          FASTGEN_UNROLL
          for (int f = 0; f < kFragments; ++f) {
            multiply_add<T>(fragment[f].score[2 * n], query[kHolds ? k : 0][f], right[0]);
            multiply_add<T>(fragment[f].score[2 * n + 1], query[kHolds ? k : 0][f], right[1]);
          }
        }
      }
      const bool finished = !kExtras && all_seen(c, s, of_warp.begin, of_warp.end, j, j + kTileKeys);
      FASTGEN_UNROLL
      for (int f = 0; f < kFragments; ++f) {
        if (!finished) fragment[f].finish(c, u, j);
        float fade[2];
        fragment[f].weigh(factor, fade);
        if (fragment[f].fades(fade)) fragment[f].rescale(fade);
        if (kExtras && drops(c)) fragment[f].drop(c, u, j);
      }
    }
    if constexpr (!kHolds) {
      arrive();
      block_barrier();  // the values are there, and nobody reads the keys any more
      if (more) load_keys(j + kTileKeys, next);
    }
    if (works) {
      FASTGEN_UNROLL
      for (int k = 0; k < kPairs; ++k) {
        uint32_t weights[kFragments][4];
        FASTGEN_UNROLL
        for (int f = 0; f < kFragments; ++f) fragment[f].pack_weights(k, weights[f]);
        FASTGEN_UNROLL
        for (int n = 0; n < kSteps; ++n) {
          uint32_t right[2][2];
          load_right_of_columns<T, kWidth>(right, keys + kTileKeys * kWidth, k * 16, n * 16);
          FASTGEN_UNROLL
          for (int f = 0; f < kFragments; ++f) {
            multiply_add<T>(fragment[f].out[2 * n], weights[f], right[0]);
            multiply_add<T>(fragment[f].out[2 * n + 1], weights[f], right[1]);
          }
        }
      }
    }
  }
  block_barrier();  // nobody reads tiles any more
  FASTGEN_UNROLL
  for (int f = 0; f < kFragments; ++f) fragment[f].put(c, u, int(blockIdx.y), shared);
}

// ---------------------------------------------------------------------------------------------------
// float32: exact products by multiply-adds. 16 threads share kRows rows: thread x has keys x, x + 16, ..., and of the
// values' width 4 x to 4 x + 3, 64 + 4 x, ...

template <int kWidth>
constexpr int kFloatKeys = 4096 / kWidth;  // of a tile: two blocks of 64 rows fit a multiprocessor

template <int kWidth, int kRows>
constexpr size_t kFloatShared =
    sizeof(float) * size_t(16 * kRows * (Tile<float, kWidth>::kRow + kFloatKeys<kWidth> + 4) +
                           2 * kFloatKeys<kWidth> * Tile<float, kWidth>::kRow);

__device__ __forceinline__ void add_products(float& sum, const float4& a, const float4& b) {
  sum = a.x * b.x + sum;
  sum = a.y * b.y + sum;
  sum = a.z * b.z + sum;
  sum = a.w * b.w + sum;
}

template <int kWidth, int kRows>
__global__ void __launch_bounds__(256, 2) attention_float_kernel(const ForwardCall c) {
  using Layout = Tile<float, kWidth>;
  constexpr int kKeys = kFloatKeys<kWidth>, kEach = kKeys / 16, kWeightRow = kKeys + 4, kParts = kWidth / 64;
  float* const queries = reinterpret_cast<float*>(dynamic_shared());  // [16 kRows]
  float* const keys = queries + 16 * kRows * Layout::kRow;            // [kKeys]
  float* const values = keys + kKeys * Layout::kRow;                  // [kKeys]
  float* const weights = values + kKeys * Layout::kRow;               // [16 kRows][kWeightRow]
  const int x = int(threadIdx.x) % 16, first_row = int(threadIdx.x) / 16 * kRows, split = int(blockIdx.y);
  const Unit u = unit_of(c, blockIdx.x, split, kKeys);
  const Sequence& s = u.sequence;
  const Rows<float> key = rows_of<float>(c.key, s.number, u.kv_head, s.key_start, c.width);
  const Rows<float> value = rows_of<float>(c.value, s.number, u.kv_head, s.key_start, c.value_width);

  float4 out[kRows][kParts] = {};
  float top[kRows], sum[kRows];
  FASTGEN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    top[r] = -INFINITY;
    sum[r] = 0.0f;
  }
  // Copies belong to groups by turns of keys and of values: all but the last have arrived means the keys have.
  if (u.keys.begin < u.keys.end) {
    load_queries<float, kWidth>(queries, c, u, 16 * kRows);
    load_tile<float, kWidth>(keys, key, u.keys.begin, kKeys, s.keys);
    copy_async_commit();
    load_tile<float, kWidth>(values, value, u.keys.begin, kKeys, s.keys);
    copy_async_commit();
  }
  for (int j = u.keys.begin; j < u.keys.end; j += kKeys) {
    copy_async_wait<1>();
    block_barrier();
    float score[kRows][kEach] = {};
    for (int k = 0; k < kWidth; k += 4) {
      float4 left[kRows];
      FASTGEN_UNROLL
      for (int r = 0; r < kRows; ++r)
        left[r] = *reinterpret_cast<const float4*>(queries + Layout::at(first_row + r, k));
      FASTGEN_UNROLL
      for (int n = 0; n < kEach; ++n) {
        const float4 right = *reinterpret_cast<const float4*>(keys + Layout::at(x + 16 * n, k));
        FASTGEN_UNROLL
        for (int r = 0; r < kRows; ++r) add_products(score[r][n], left[r], right);
      }
    }
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Row row = row_at(c, u, first_row + r);
      float highest = top[r];
      FASTGEN_UNROLL
      for (int n = 0; n < kEach; ++n) {
        score[r][n] = score_of(c, u, row, j + x + 16 * n, score[r][n]);
        highest = fmaxf(highest, score[r][n]);
      }
      FASTGEN_UNROLL
      for (int mask = 1; mask < 16; mask *= 2) highest = fmaxf(highest, shuffle_xor(highest, mask));
      const float base = highest == -INFINITY ? 0.0f : highest, fade = exp2_approx(top[r] - base);
      top[r] = highest;
      sum[r] *= fade;
      FASTGEN_UNROLL
      for (int i = 0; i < kParts; ++i) {
        float4& o = out[r][i];
        o = {o.x * fade, o.y * fade, o.z * fade, o.w * fade};
      }
      uint64_t kept = ~uint64_t(0);
      if (drops(c)) {
        kept = kept_keys(c, s, row.head.row + row.query, j, x, 16);
        FASTGEN_UNROLL
        for (int mask = 1; mask < 16; mask *= 2) kept |= shuffle_xor(kept, mask);
      }
      FASTGEN_UNROLL
      for (int n = 0; n < kEach; ++n) {
        const float weight = exp2_approx(score[r][n] - base);
        sum[r] += weight;
        weights[(first_row + r) * kWeightRow + x + 16 * n] = (kept >> (x + 16 * n) & 1) != 0 ? weight : 0.0f;
      }
    }
    copy_async_wait<0>();
    block_barrier();  // weights and values are there, and nobody reads the keys any more
    const bool more = j + kKeys < u.keys.end;
    if (more) load_tile<float, kWidth>(keys, key, j + kKeys, kKeys, s.keys);
    copy_async_commit();
    for (int k = 0; k < kKeys; k += 4) {
      float left[kRows][4];
      FASTGEN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float4 four = *reinterpret_cast<const float4*>(weights + (first_row + r) * kWeightRow + k);
        left[r][0] = four.x, left[r][1] = four.y, left[r][2] = four.z, left[r][3] = four.w;
      }
      FASTGEN_UNROLL
      for (int e = 0; e < 4; ++e) {
        FASTGEN_UNROLL
        for (int i = 0; i < kParts; ++i) {
          const float4 right = *reinterpret_cast<const float4*>(values + Layout::at(k + e, 64 * i + 4 * x));
          FASTGEN_UNROLL
          for (int r = 0; r < kRows; ++r) {
            float4& o = out[r][i];
            const float weight = left[r][e];
            o = {weight * right.x + o.x, weight * right.y + o.y, weight * right.z + o.z, weight * right.w + o.w};
          }
        }
      }
    }
    block_barrier();
    if (more) load_tile<float, kWidth>(values, value, j + kKeys, kKeys, s.keys);
    copy_async_commit();
  }
  copy_async_wait<0>();

  FASTGEN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGEN_UNROLL
    for (int mask = 1; mask < 16; mask *= 2) sum[r] += shuffle_xor(sum[r], mask);
    if (first_row + r >= u.count) continue;
    const Row row = row_at(c, u, first_row + r);
    if (x == 0) finish_row(c, row, split, top[r], sum[r]);
    const bool splits = c.splits > 1;
    const float share = splits ? 1.0f : share_of(c, sum[r]);
    float* to = static_cast<float*>(const_cast<void*>(c.out.data));
    to = splits ? c.parts + (split * c.rows + row.head.row + row.query) * c.value_width
                : to + offset_of(c.out, u, place_of(c, u, u.first + first_row + r));
    FASTGEN_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const float o[4] = {out[r][i].x, out[r][i].y, out[r][i].z, out[r][i].w};
      FASTGEN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int at = 64 * i + 4 * x + e;
        if (at < c.value_width) to[at] = o[e] * share;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// The parts of a row, a block for each row of lse and a thread for each element, in the order of the keys.

__global__ void join_kernel(const ForwardCall c) {
  const int64_t row = blockIdx.x;
  float top = -INFINITY, sum = 0.0f, out = 0.0f;
  for (int i = 0; i < c.splits; ++i) top = fmaxf(top, c.tops[i * c.rows + row].x);
  const float base = top == -INFINITY ? 0.0f : top;
  const int k = int(threadIdx.x);
  for (int i = 0; i < c.splits; ++i) {
    const float2 part = c.tops[i * c.rows + row];
    const float weight = exp2_approx(part.x - base);
    sum += weight * part.y;
    if (k < c.value_width) out += weight * c.parts[(i * c.rows + row) * c.value_width + k];
  }
  if (k == 0) c.lse[row] = sum == 0.0f ? -INFINITY : top * kLn2 + logf(sum);
  if (k >= c.value_width) return;
  out *= share_of(c, sum);
  const int64_t head = row / c.queries;  // of all sequences; ragged ones are one in memory
  const int64_t at =
      head / c.heads * c.out.stride[0] + head % c.heads * c.out.stride[1] + row % c.queries * c.out.stride[2] + k;
  void* const to = const_cast<void*>(c.out.data);
  switch (c.dtype) {
    case DType::kBFloat16: narrow(out, static_cast<BFloat16*>(to) + at); break;
    case DType::kFloat16: narrow(out, static_cast<Float16*>(to) + at); break;
    default: static_cast<float*>(to)[at] = out;
  }
}

}  // namespace
}  // namespace fastgen
