// What the kernels of the forward pass of attention share: what a block works on, and fragments of rows on their way
// from scores to sums of values.
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

  // From scores to weights. Where a top rises, what was summed up under the old one fades: the sum of the weights does,
  // and where fades(fade) says so, `out` is to be rescaled. factor: from scores to units of log 2.
  __device__ __forceinline__ void weigh(float factor, float (&fade)[2]) {
    float base[2], weights[2] = {0.0f, 0.0f};
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
  }

  static __device__ __forceinline__ bool fades(const float (&fade)[2]) {
    return warp_any(fade[0] != 1.0f || fade[1] != 1.0f);
  }
  __device__ __forceinline__ void rescale(const float (&fade)[2]) {
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

}  // namespace
}  // namespace fastgen
