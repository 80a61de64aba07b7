// The forward pass of attention (Dao, "FlashAttention-2: faster attention with better parallelism and work
// partitioning", 2023): a block has a tile of query rows and walks over the keys that they see, tile by tile; scores,
// weights and the running maximum and sum of each row stay in registers.
//
// Rows of a tile are those of one head or, where there are few queries, of all the heads that read one key head, so
// that a tile of keys serves all of them. And where there are too few tiles of queries to fill the device, the keys of
// each are split over several blocks, whose sums another kernel joins.
#pragma once

#include "attention.h"

namespace fastgen {
namespace {

struct ForwardCall : AttentionCall {
  Tensor4 out;
  float* lse;
  int group;      // heads that read one key head
  int packed;     // heads whose rows are packed together: 1 or `group`
  int tile_rows;  // of a block
  int tiles;      // of the rows of every sequence, unless ragged
  int splits;     // of the keys of a tile of rows
  int64_t rows;   // of lse
  float* parts;   // [splits][rows][value_width]: sums of values relative to 2^top
  float2* tops;   // [splits][rows]: top in units of log 2, and the sum of the weights relative to 2^top
};

// What a block works on: `count` of the rows of some heads, row r being query r % queries of head first_head +
// r / queries.
struct Unit {
  Sequence sequence;
  int first_head, kv_head;
  int first, count;
  Range keys;  // from a whole tile of keys on
};

struct Place {
  int head, query;
};
FASTGEN_FN Place place_of(const ForwardCall& c, const Unit& u, int row) {
  if (c.packed == 1) return {u.first_head, row};
  return {u.first_head + row / u.sequence.queries, row % u.sequence.queries};
}

// Queries of the rows [first, end), or more.
FASTGEN_FN Range queries_of(const ForwardCall& c, const Unit& u, int first, int end) {
  if (c.packed == 1) return {first, end};
  return {0, u.sequence.queries};
}

// Tiles of rows go from the last to the first: under a causal mask the last ones see most keys, and long blocks that
// start early leave no tail.
FASTGEN_FN Unit unit_of(const ForwardCall& c, unsigned unit, int split, int tile_keys) {
  Unit u;
  const unsigned units_of_each = unsigned(c.packed == 1 ? c.heads : c.kv_heads) * unsigned(c.tiles);
  u.sequence = sequence_of(c, unit, units_of_each);
  const int rows = c.packed * u.sequence.queries;
  const int tiles = c.query_starts == nullptr ? c.tiles : (rows + c.tile_rows - 1) / c.tile_rows;
  const int head = int(unit / unsigned(tiles));
  u.first_head = head * c.packed;
  u.kv_head = c.packed == 1 ? int(unsigned(head) / unsigned(c.group)) : head;
  u.first = (tiles - 1 - (int(unit) - head * tiles)) * c.tile_rows;
  u.count = smaller_int(c.tile_rows, rows - u.first);
  const Range queries = queries_of(c, u, u.first, u.first + u.count);
  u.keys = seen_keys(c, u.sequence, queries.begin, queries.end);
  u.keys.begin = u.keys.begin / tile_keys * tile_keys;
  if (c.splits > 1) {
    const int key_tiles = (larger_int(u.keys.end - u.keys.begin, 0) + tile_keys - 1) / tile_keys;
    const int length = (key_tiles + c.splits - 1) / c.splits * tile_keys;
    u.keys.begin += split * length;
    u.keys.end = smaller_int(u.keys.end, u.keys.begin + length);
  }
  return u;
}

FASTGEN_FN int64_t offset_of(const Tensor4& tensor, const Unit& u, const Place& place) {
  return u.sequence.number * tensor.stride[0] + place.head * tensor.stride[1] +
         int64_t(u.sequence.query_start + place.query) * tensor.stride[2];
}

// The tile of queries, from row u.first on.
template <class T, int kWidth>
__device__ __forceinline__ void load_queries(T* tile, const ForwardCall& c, const Unit& u, int rows) {
  // Alignment is a matter of all strides: another head may start elsewhere.
  Rows<T> from = rows_of<T>(c.query, 0, 0, 0, c.width);
  constexpr int kPiece = Tile<T, kWidth>::kPiece;
  from.vectors = from.vectors && c.query.stride[0] % kPiece == 0 && c.query.stride[1] % kPiece == 0;
  load_tile<T, kWidth>(tile, from, rows, [&](int row) {
    return row < u.count ? offset_of(c.query, u, place_of(c, u, u.first + row)) : int64_t(-1);
  });
}

// Where a row's results belong, and what its scores need. Rows behind the last are taken for the last; nothing of them
// is kept.
struct Row {
  Head head;
  int query;
  int first;       // key that it sees
  unsigned count;  // of them, as far as places say
};
FASTGEN_FN Row row_at(const ForwardCall& c, const Unit& u, int row) {
  const Place place = place_of(c, u, u.first + smaller_int(row, u.count - 1));
  const Range seen = seen_keys(c, u.sequence, place.query, place.query + 1);
  return {head_of(c, u.sequence, place.head), place.query, seen.begin, unsigned(larger_int(seen.end - seen.begin, 0))};
}
FASTGEN_FN bool sees(const Row& row, int key) { return unsigned(key - row.first) < row.count; }

// A score that is -inf is not seen.
FASTGEN_FN float score_of(const ForwardCall& c, const Unit& u, const Row& row, int key, float product) {
  float tangent;
  if (!sees(row, key)) return -INFINITY;
  return finish_score(c, u.sequence, row.head, row.query, key, product, tangent);
}

// The logarithm of a row's sum, or its part of it.
__device__ __forceinline__ void finish_row(const ForwardCall& c, const Row& row, int split, float top, float sum) {
  const int64_t number = row.head.row + row.query;
  if (c.splits > 1) {
    c.tops[split * c.rows + number] = {top, sum};
  } else {
    c.lse[number] = sum == 0.0f ? -INFINITY : top * kLn2 + logf(sum);
  }
}

// What sums of values are multiplied with; a row that sees no key has the value 0.
FASTGEN_FN float share_of(const ForwardCall& c, float sum) { return sum == 0.0f ? 0.0f : c.kept_weight / sum; }

// ---------------------------------------------------------------------------------------------------
// bfloat16, float16: products on tensor cores. A warp has one or two fragments of 16 rows; with two, what it reads of
// keys and values serves twice as many products. Of two rows of a fragment, lane / 4 and the one 8 below, a thread has
// every fourth pair of keys, and the same of the width in the sums of values.

constexpr int kTileKeys = 64, kPairs = kTileKeys / 16;

// Extras: softcap, mask, ALiBi, dropout, a scale that is not above 0. Without them the scale is applied with the exp2.
template <class T, int kWidth, bool kExtras>
struct Fragment {
  int first;  // row of the block
  float score[2 * kPairs][4];
  float out[kWidth / 8][4];
  float top[2], sum[2];  // top: the highest score so far, in units of log 2; the sum and out are relative to 2^top

  __device__ __forceinline__ void start(int first_row) {
    first = first_row;
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
    clear(out);
  }

  FASTGEN_MEMBER int number(int r) const { return first + int(threadIdx.x) % 32 / 4 + 8 * r; }
  FASTGEN_MEMBER static int column(int n) { return n * 8 + int(threadIdx.x) % 4 * 2; }

  template <int kCount>
  FASTGEN_MEMBER static void clear(float (&x)[kCount][4]) {
    FASTGEN_UNROLL
    for (int n = 0; n < kCount; ++n) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
  }

  // Calls body(score, key) for all of a row.
  template <class Body>
  __device__ __forceinline__ void for_scores(int r, int j, const Body& body) {
    FASTGEN_UNROLL
    for (int n = 0; n < 2 * kPairs; ++n) {
      FASTGEN_UNROLL
      for (int e = 0; e < 2; ++e) body(score[n][2 * r + e], j + column(n) + e);
    }
  }

  // From products with the keys from j on to scores, -inf where a key is not seen: one loop after the other, so that
  // what is asked for is decided once and not for each score.
  __device__ __forceinline__ void finish(const ForwardCall& c, const Unit& u, int j) {
    FASTGEN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Row row = row_at(c, u, number(r));
      if constexpr (kExtras) {
        float tangent;
        for_scores(r, j, [&](float& x, int) { x = capped(c, x, tangent); });
        if (row.head.mask != nullptr) {
          with_mask_row(c, row.head, row.query, [&](const auto* mask) {
            for_scores(r, j, [&](float& x, int key) {
              if (sees(row, key)) x = masked(x, mask[key * c.mask.stride[3]]);
            });
          });
        }
        if (row.head.slope != 0.0f) {
          for_scores(r, j, [&](float& x, int key) { x = biased(u.sequence, row.head, row.query, key, x); });
        }
      }
      for_scores(r, j, [&](float& x, int key) {
        if (!sees(row, key)) x = -INFINITY;
      });
    }
  }

  // From scores to weights. Where a top rises, what was summed up under the old one fades. factor: from scores to units
  // of log 2.
  __device__ __forceinline__ void weigh(float factor) {
    float base[2], fade[2], weights[2] = {0.0f, 0.0f};
    FASTGEN_UNROLL
    for (int r = 0; r < 2; ++r) {
      float highest = -INFINITY;
      FASTGEN_UNROLL
      for (int n = 0; n < 2 * kPairs; ++n) highest = fmaxf(highest, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
      highest = fmaxf(highest, shuffle_xor(highest, 1));
      highest = fmaxf(highest, shuffle_xor(highest, 2));
      highest = fmaxf(top[r], highest * factor);
      // A row that has seen no key has no top: its weights are 2^-inf. A top that stays fades nothing, exactly.
      base[r] = highest == -INFINITY ? 0.0f : highest;
      fade[r] = exp2_approx(top[r] - base[r]);
      top[r] = highest;
    }
    FASTGEN_UNROLL
    for (int n = 0; n < 2 * kPairs; ++n) {
      FASTGEN_UNROLL
      for (int e = 0; e < 4; ++e) {
        score[n][e] = exp2_approx(score[n][e] * factor - base[e / 2]);
        weights[e / 2] += score[n][e];
      }
    }
    sum[0] = sum[0] * fade[0] + weights[0];
    sum[1] = sum[1] * fade[1] + weights[1];
    if (!warp_any(fade[0] != 1.0f || fade[1] != 1.0f)) return;
    FASTGEN_UNROLL
    for (int n = 0; n < kWidth / 8; ++n) {
      FASTGEN_UNROLL
      for (int e = 0; e < 4; ++e) out[n][e] *= fade[e / 2];
    }
  }

  // Dropout of the weights.
  __device__ __forceinline__ void drop(const ForwardCall& c, const Unit& u, int j) {
    FASTGEN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Row row = row_at(c, u, number(r));
      uint64_t kept = kept_keys(c, u.sequence, row.head.row + row.query, j, int(threadIdx.x) % 4, 4);
      kept |= shuffle_xor(kept, 1);
      kept |= shuffle_xor(kept, 2);
      FASTGEN_UNROLL
      for (int n = 0; n < 2 * kPairs; ++n) {
        FASTGEN_UNROLL
        for (int e = 0; e < 2; ++e) {
          if ((kept >> (column(n) + e) & 1) == 0) score[n][2 * r + e] = 0.0f;
        }
      }
    }
  }

  // The weights of 16 keys as the left side of a product: results of one are, in pairs, the left side of the next.
  __device__ __forceinline__ void pack_weights(int pair, uint32_t (&left)[4]) const {
    FASTGEN_UNROLL
    for (int i = 0; i < 4; ++i)
      left[i] = pack<T>(score[2 * pair + i / 2][i % 2 * 2], score[2 * pair + i / 2][i % 2 * 2 + 1]);
  }

  // Writes what is known of the rows: their results, or parts of them. tile: for the rows of the block.
  __device__ __forceinline__ void put(const ForwardCall& c, const Unit& u, int split, T* tile) {
    FASTGEN_UNROLL
    for (int r = 0; r < 2; ++r) {
      sum[r] += shuffle_xor(sum[r], 1);
      sum[r] += shuffle_xor(sum[r], 2);
      const bool there = number(r) < u.count;
      const Row row = row_at(c, u, number(r));
      if (there && threadIdx.x % 4 == 0) finish_row(c, row, split, top[r], sum[r]);
      float* const part = c.parts + (split * c.rows + row.head.row + row.query) * c.value_width;
      const float share = share_of(c, sum[r]);
      FASTGEN_UNROLL
      for (int n = 0; n < kWidth / 8; ++n) {
        const float low = out[n][2 * r], high = out[n][2 * r + 1];
        if (c.splits > 1) {
          if (there && column(n) < c.value_width) part[column(n)] = low;
          if (there && column(n) + 1 < c.value_width) part[column(n) + 1] = high;
        } else {
          T* const to = tile + Tile<T, kWidth>::at(number(r), column(n));
          *reinterpret_cast<uint32_t*>(to) = pack<T>(low * share, high * share);  // columns are even
        }
      }
    }
    if (c.splits > 1) return;
    warp_barrier();  // the rows of a fragment are its warp's alone, which takes them out again in whole pieces
    constexpr int kPieces = kWidth / 8;
    T* const to = static_cast<T*>(const_cast<void*>(c.out.data));
    for (int i = int(threadIdx.x) % 32; i < 16 * kPieces; i += 32) {
      const int row = first + i / kPieces, piece = i % kPieces * 8;
      if (row >= u.count || piece >= c.value_width) continue;
      const T* from = tile + Tile<T, kWidth>::at(row, piece);
      T* const at = to + offset_of(c.out, u, place_of(c, u, u.first + row)) + piece;
      if (c.value_width % 8 == 0) {  // out is a fresh tensor: then its rows are aligned
        *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int k = 0; k < 8 && piece + k < c.value_width; ++k) at[k] = from[k];
      }
    }
  }
};

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
        fragment[f].weigh(factor);
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
