// What both directions of attention share on the device: what a call is, who sees whom, from products to scores,
// dropout, and tiles of rows in shared memory with the fragments of tensor-core products that are read from them.
//
// A tile has rows of 64 or 128 elements, whatever the width: what is behind it is zero. Scores are kept in units of
// log 2, so that a weight is one exp2.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/params.h"
#include "../common/philox.h"
#include "../torch/attention_arguments.h"
#include "check.h"
#include "device.h"
#include "upload.h"

namespace fastgen {
namespace {

// AttentionParams as a kernel takes it, by value. Lengths stay below kLongest and the bounds of the window at most
// twice that, so that places and their sums fit an int.
constexpr int kLongest = 1 << 29;

struct AttentionCall {
  DType dtype, mask_dtype;
  int sequences, heads, kv_heads;
  int queries, keys;  // of every sequence; ragged: of all together
  int width, value_width;
  const int64_t *query_starts, *key_starts, *first_units;  // ragged: on the device; otherwise null
  Tensor4 query, key, value, mask;
  const float* slopes;  // or null
  int64_t slope_batch, slope_head;
  float scale;          // of the scores
  float product_scale;  // of a product: makes it the argument of tanh, if there is a softcap, or else a score
  float cap;            // softcap in units of log 2; 0: none
  int left, right;
  bool lower_right;
  uint64_t keep;               // 2^32: no dropout
  float kept_weight;           // 1 / (1 - dropout_p)
  const int64_t* seed_offset;  // on the device
};

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

constexpr int64_t kWidest = 128;

// Whether the kernels take a call at all.
inline bool takes_attention(const AttentionParams& p) {
  return p.dtype != DType::kFloat64 && p.width <= kWidest && p.value_width <= kWidest && p.queries < kLongest &&
         p.keys < kLongest && p.batch < kLongest;
}

// seed_offset: contiguous, on the device; see seed_offset_pointer.
inline AttentionCall attention_call(const AttentionParams& p, const int64_t* seed_offset) {
  AttentionCall c{};
  c.dtype = p.dtype;
  c.mask_dtype = p.mask_dtype;
  c.sequences = int(p.batch);
  c.heads = int(p.heads);
  c.kv_heads = int(p.kv_heads);
  c.queries = int(p.queries);
  c.keys = int(p.keys);
  c.width = int(p.width);
  c.value_width = int(p.value_width);
  c.query = p.query;
  c.key = p.key;
  c.value = p.value;
  c.mask = p.mask;
  c.slopes = static_cast<const float*>(p.slopes);
  c.slope_batch = p.slope_batch;
  c.slope_head = p.slope_head;
  c.scale = float(p.scale);
  c.product_scale = p.softcap > 0 ? float(p.scale / p.softcap) : float(p.scale) * kLog2E;
  c.cap = p.softcap > 0 ? float(p.softcap) * kLog2E : 0.0f;
  c.left = int(std::min<int64_t>(p.left, 2 * kLongest - 1));
  c.right = int(std::min<int64_t>(p.right, 2 * kLongest - 1));
  c.lower_right = p.lower_right;
  c.keep = p.keep;
  c.kept_weight = float(p.kept_weight);
  c.seed_offset = seed_offset;
  return c;
}

// Puts the starts of ragged sequences, and the first units that are planned of them, on the device; they stand in the
// tensor that is given back. Elsewhere nothing.
inline Optional upload_starts(AttentionCall& c, const AttentionParams& p, const Tensor& like) {
  if (p.query_starts == nullptr) return std::nullopt;
  const int64_t count = p.batch + 1;
  std::vector<int64_t> numbers(p.query_starts, p.query_starts + count);
  numbers.insert(numbers.end(), p.key_starts, p.key_starts + count);
  numbers.insert(numbers.end(), p.first_units, p.first_units + count);
  const Tensor out = upload(numbers, like);
  c.query_starts = static_cast<const int64_t*>(out.const_data_ptr());
  c.key_starts = c.query_starts + count;
  c.first_units = c.key_starts + count;
  return out;
}

// ---------------------------------------------------------------------------------------------------
// Who sees whom

FASTGEN_FN int smaller_int(int a, int b) { return a < b ? a : b; }
FASTGEN_FN int larger_int(int a, int b) { return a < b ? b : a; }

struct Sequence {
  int number;
  int query_start, key_start;  // of its rows among all; 0 unless ragged
  int queries, keys;
  int shift;  // place of query 0 among the keys
};

FASTGEN_FN Sequence sequence_at(const AttentionCall& c, int number) {
  Sequence s;
  s.number = number;
  const bool ragged = c.query_starts != nullptr;
  s.query_start = ragged ? int(c.query_starts[number]) : 0;
  s.key_start = ragged ? int(c.key_starts[number]) : 0;
  s.queries = ragged ? int(c.query_starts[number + 1]) - s.query_start : c.queries;
  s.keys = ragged ? int(c.key_starts[number + 1]) - s.key_start : c.keys;
  s.shift = c.lower_right ? s.keys - s.queries : 0;
  return s;
}

// The sequence that a unit belongs to, of units_of_each of every sequence or, ragged, as first_units says; `unit`
// becomes its number there.
template <class Int>
FASTGEN_FN Sequence sequence_of(const AttentionCall& c, Int& unit, std::type_identity_t<Int> units_of_each) {
  int low = 0;
  if (c.query_starts == nullptr) {
    low = int(unit / units_of_each);
    unit -= low * units_of_each;
  } else {
    int high = c.sequences;  // first_units[low] <= unit < first_units[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (c.first_units[middle] <= unit ? low : high) = middle;
    }
    unit -= Int(c.first_units[low]);
  }
  return sequence_at(c, low);
}

struct Range {
  int begin, end;
};

// The keys that the queries [first, end) see, or more: not all of them need to be seen by each. Empty: begin >= end.
FASTGEN_FN Range seen_keys(const AttentionCall& c, const Sequence& s, int first, int end) {
  return {larger_int(0, first + s.shift - c.left), smaller_int(s.keys, end + s.shift + c.right)};
}

// The queries that see any of the keys [first, end), or more.
FASTGEN_FN Range seeing_queries(const AttentionCall& c, const Sequence& s, int first, int end) {
  return {larger_int(0, first - s.shift - c.right), smaller_int(s.queries, end - s.shift + c.left)};
}

// Whether each of the queries [first, end) sees each of the keys [first_key, end_key), as far as places say.
FASTGEN_FN bool all_seen(const AttentionCall& c, const Sequence& s, int first, int end, int first_key, int end_key) {
  return end_key <= s.keys && first_key >= end - 1 + s.shift - c.left && end_key - 1 <= first + s.shift + c.right;
}

FASTGEN_FN bool sees(const AttentionCall& c, const Sequence& s, int query, int key) {
  const int place = query + s.shift;
  return key < s.keys && key >= place - c.left && key <= place + c.right;
}

// ---------------------------------------------------------------------------------------------------
// Scores

// One head of one sequence.
struct Head {
  int64_t row;       // number of its query 0 among the rows of lse
  const char* mask;  // row of query 0, or null
  float slope;       // of ALiBi, in units of log 2
};

FASTGEN_FN int element_size_of(DType dtype) { return dtype == DType::kBool ? 1 : dtype == DType::kFloat32 ? 4 : 2; }

FASTGEN_FN Head head_of(const AttentionCall& c, const Sequence& s, int head) {
  Head out;
  out.row =
      (c.query_starts != nullptr ? int64_t(head) : int64_t(s.number) * c.heads + head) * c.queries + s.query_start;
  out.mask = nullptr;
  if (c.mask.data != nullptr) {
    out.mask = static_cast<const char*>(c.mask.data) +
               (s.number * c.mask.stride[0] + head * c.mask.stride[1]) * element_size_of(c.mask_dtype);
  }
  out.slope = c.slopes == nullptr ? 0.0f : c.slopes[s.number * c.slope_batch + head * c.slope_head] * kLog2E;
  return out;
}

// What an element of a floating mask adds to a score. What is finite stays so: the lowest number is a common mask, and
// a row of nothing else has the mean of all values.
FASTGEN_FN float masking(float added) {
  constexpr float kLowest = -3.40282347e38f;
  const float scaled = added * kLog2E;
  return scaled < kLowest && added >= kLowest ? kLowest : scaled;
}

// Calls body(row), the mask's row of a query as its elements, for a mask of any dtype; element `key` is
// row[key * c.mask.stride[3]].
template <class Body>
FASTGEN_MEMBER void with_mask_row(const AttentionCall& c, const Head& head, int query, const Body& body) {
  const char* row = head.mask + query * c.mask.stride[2] * element_size_of(c.mask_dtype);
  switch (c.mask_dtype) {
    case DType::kBool: return body(reinterpret_cast<const bool*>(row));
    case DType::kBFloat16: return body(reinterpret_cast<const BFloat16*>(row));
    case DType::kFloat16: return body(reinterpret_cast<const Float16*>(row));
    default: return body(reinterpret_cast<const float*>(row));
  }
}
FASTGEN_FN float masked(float score, bool seen) { return seen ? score : -INFINITY; }
template <class T>
FASTGEN_FN float masked(float score, T added) {
  return score + masking(widen(added));
}

// From a product to a score before mask and ALiBi; with a softcap `tangent` becomes the hyperbolic tangent,
// 1 - tangent^2 the derivative.
FASTGEN_FN float capped(const AttentionCall& c, float product, float& tangent) {
  const float score = product * c.product_scale;
  if (!(c.cap > 0)) return score;
  tangent = tanhf(score);
  return tangent * c.cap;
}

FASTGEN_FN float biased(const Sequence& s, const Head& head, int query, int key, float score) {
  return score - head.slope * fabsf(float(query + s.shift - key));
}

// From the product of a query and a key that it sees to their score.
FASTGEN_FN float finish_score(const AttentionCall& c, const Sequence& s, const Head& head, int query, int key,
                              float product, float& tangent) {
  float score = capped(c, product, tangent);
  if (head.mask != nullptr) {
    with_mask_row(c, head, query, [&](const auto* row) { score = masked(score, row[key * c.mask.stride[3]]); });
  }
  return head.slope != 0.0f ? biased(s, head, query, key, score) : score;
}

// ---------------------------------------------------------------------------------------------------
// Dropout

FASTGEN_FN bool drops(const AttentionCall& c) { return c.keep < (uint64_t(1) << 32); }

// Bit k: whether the weight of key `key` + k (of its sequence) is kept, for 64 keys of a row of lse. Row-major numbers
// in (batch, heads, queries, keys), ragged: all keys together. A Philox block decides four neighbours; this call draws
// every `parts`-th block from `part` on, and the bits of all parts together are the answer.
FASTGEN_FN uint64_t kept_keys(const AttentionCall& c, const Sequence& s, int64_t row, int key, int part, int parts) {
  const uint64_t element = uint64_t(c.seed_offset[1]) + uint64_t(row) * uint64_t(c.keys) + uint64_t(s.key_start + key);
  const int lead = int(element & 3);
  const PhiloxKey philox{uint64_t(c.seed_offset[0])};
  uint64_t bits = 0;
  for (int b = part; 4 * b - lead < 64; b += parts) {
    const uint64_t block = (element / 4 + uint64_t(b)) & (~uint64_t(0) >> 2);
    uint64_t c0[1] = {block}, c1[1] = {block >> 32}, c2[1] = {0}, c3[1] = {kWidth32};
    philox4x32_10(c0, c1, c2, c3, philox);
    const uint32_t words[4] = {uint32_t(c0[0]), uint32_t(c1[0]), uint32_t(c2[0]), uint32_t(c3[0])};
    FASTGEN_UNROLL
    for (int w = 0; w < 4; ++w) {
      const int bit = 4 * b + w - lead;
      if (bit >= 0 && bit < 64 && words[w] < c.keep) bits |= uint64_t(1) << bit;
    }
  }
  return bits;
}

// ---------------------------------------------------------------------------------------------------
// Tiles in shared memory

// Rows of a head of a tensor (batch, heads, length, width): element (i, k) is data[i * row + k * step].
template <class T>
struct Rows {
  const T* data;
  int64_t row, step;
  int width;
  bool vectors;  // whether rows are whole aligned pieces of 16 bytes
};

template <class T>
FASTGEN_FN Rows<T> rows_of(const Tensor4& tensor, int batch, int head, int start, int width) {
  constexpr int kPiece = 16 / int(sizeof(T));
  Rows<T> out;
  const int64_t row = tensor.stride[2];
  out.data =
      static_cast<const T*>(tensor.data) + batch * tensor.stride[0] + head * tensor.stride[1] + int64_t(start) * row;
  out.row = row;
  out.step = tensor.stride[3];
  out.width = width;
  out.vectors =
      out.step == 1 && width % kPiece == 0 && row % kPiece == 0 && reinterpret_cast<uintptr_t>(out.data) % 16 == 0;
  return out;
}

// Where element (row, column) of a tile stands. Half types: the eight rows of a matrix that load_matrices reads would
// all start at the same bank; so the pieces of 16 bytes of a row change places, and their places differ in any eight
// rows that follow each other.
template <class T, int kWidth>
struct Tile {
  static constexpr int kPiece = 8;
  static constexpr int kRow = kWidth;
  FASTGEN_MEMBER static int at(int row, int column) {
    return row * kRow + (((column / kPiece) ^ (row & 7)) * kPiece | column % kPiece);
  }
};
// float32: threads read four neighbours of eight rows at once; four more elements a row set them apart.
template <int kWidth>
struct Tile<float, kWidth> {
  static constexpr int kPiece = 4;
  static constexpr int kRow = kWidth + 4;
  FASTGEN_MEMBER static int at(int row, int column) { return row * kRow + column; }
};

// The whole block brings `rows` rows into a tile: row r from the element place(r) on, counted from from.data; zeros
// where that is negative, and in columns behind the width. Where there are vectors the copies are asynchronous and
// belong to the group that is committed next; in any case they are seen by others after a barrier.
template <class T, int kWidth, class Place>
__device__ __forceinline__ void load_tile(T* tile, const Rows<T>& from, int rows, const Place& place) {
  using Layout = Tile<T, kWidth>;
  constexpr int kPiece = Layout::kPiece, kPieces = kWidth / kPiece;
  const int column = int(threadIdx.x) % kPieces * kPiece;  // a thread has the same piece of all its rows
  for (int row = int(threadIdx.x) / kPieces; row < rows; row += int(blockDim.x) / kPieces) {
    const int64_t at = place(row);
    T* to = tile + Layout::at(row, column);
    if (from.vectors) {
      const bool there = at >= 0 && column < from.width;
      copy_async16(to, from.data + (there ? at + column : 0), there);
    } else {
      for (int k = 0; k < kPiece; ++k) {
        const bool there = at >= 0 && column + k < from.width;
        to[k] = there ? from.data[at + (column + k) * from.step] : T{};
      }
    }
  }
}

// Rows [first, first + rows); those from `end` on are zero. kThreads: of the block, where it has always as many.
template <class T, int kWidth, int kThreads = 0>
__device__ __forceinline__ void load_tile(T* tile, const Rows<T>& from, int first, int rows, int end) {
  using Layout = Tile<T, kWidth>;
  constexpr int kPiece = Layout::kPiece, kPieces = kWidth / kPiece;
  if (!from.vectors) {
    return load_tile<T, kWidth>(tile, from, rows,
                                [&](int row) { return first + row < end ? (first + row) * from.row : int64_t(-1); });
  }
  // The usual case, in as few instructions as it takes: they stand between the products. The address of what is not
  // there is not read from.
  const int step = (kThreads > 0 ? kThreads : int(blockDim.x)) / kPieces;
  const int start = int(threadIdx.x) / kPieces, column = int(threadIdx.x) % kPieces * kPiece;
  const int there = column < from.width ? end - first : 0;
  const T* at = from.data + (first + start) * from.row + column;
  const int64_t stride = step * from.row;
  const auto copy = [&](int row) {
    copy_async16(tile + Layout::at(row, column), at, row < there);
    at += stride;
  };
  if constexpr (kThreads > 0) {
    FASTGEN_UNROLL
    for (int row = 0; row < rows; row += step) copy(start + row);
  } else {
    for (int row = start; row < rows; row += step) copy(row);
  }
}

// Fragments of products of a warp (multiply_add, 16 x 8 results of depth 16). Thread `lane` has of a result d[0], d[1]
// in row lane / 4 and columns 2 (lane % 4) and one more, d[2], d[3] in the row 8 below.

// Left side: rows [row, row + 16) and depth [column, column + 16) of the tile.
template <class T, int kWidth>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int row, int column) {
  const int lane = int(threadIdx.x) % 32;
  load_matrices(a, tile + Tile<T, kWidth>::at(row + lane % 16, column + lane / 16 * 8));
}

// Right sides of two results, whose columns are rows [row, row + 16) of the tile, over the depth [column, column + 16):
// for left . tile^T.
template <class T, int kWidth>
__device__ __forceinline__ void load_right_of_rows(uint32_t (&b)[2][2], const T* tile, int row, int column) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t r[4];
  load_matrices(r, tile + Tile<T, kWidth>::at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// The same of columns [column, column + 16) over the depth of rows [row, row + 16): for left . tile.
template <class T, int kWidth>
__device__ __forceinline__ void load_right_of_columns(uint32_t (&b)[2][2], const T* tile, int row, int column) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t r[4];
  load_matrices_transposed(r, tile + Tile<T, kWidth>::at(row + lane % 16, column + lane / 16 * 8));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

}  // namespace
}  // namespace fastgen
