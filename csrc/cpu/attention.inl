// Scaled dot-product attention, written once over Isa (after a vec_*.h): what both directions share, and the forward
// pass.
//
// Lanes are queries. A block of up to 4 vectors of queries is packed once, transposed, [D][queries], and is the right
// side of the product K Q^T, whose left side, the rows of K, is read where it stands. Its result S^T, [keys][queries],
// has the running maximum and sum of each query in a lane of its own, so the softmax needs no sum across lanes; and P^T
// is again a right side, of O^T += V^T P^T, whose left side, the columns of V, is read where it stands. Nothing of the
// size of all scores exists.
//
// The sides of a product are elements of its arithmetic A (Multiply in product.inl): T, or pairs of bfloat16 along the
// depth. Scores, sums and everything between two products are T.
//
// Scores are kept in units of log 2. What a block of queries computes depends on nothing but the block: not on the
// thread, nor on the blocks that share its keys.
#pragma once

#include <limits>

#include "../common/activations.h"
#include "product.inl"
#include "fill.inl"

namespace fastgen {
namespace {

// Rows of `width` elements as whole vectors of T, zeros behind the last element; element (r, k) stands at
// from[r * row + k * step].
template <class T, class Storage>
FASTGEN_FN void read_rows_of(const Storage* from, int64_t row, int64_t step, int64_t rows, int64_t width, T* out,
                             int64_t out_row) {
  using F = typename Work<T>::F;
  for (int64_t r = 0; r < rows; ++r, from += row, out += out_row) {
    if (step == 1) {
      for (int64_t k = 0; k < width; k += kLanes<T>) {
        store(out + k, take<F>(from + k, width - k < kLanes<T> ? int(width - k) : kLanes<T>));
      }
    } else {
      for (int64_t k = 0; k < width; ++k) out[k] = T(widen(from[k * step]));
      for (int64_t k = width; k % kLanes<T> != 0; ++k) out[k] = T(0);
    }
  }
}
// The same as they are, zeros up to the end of the row.
inline void read_rows_of(const BFloat16* from, int64_t row, int64_t step, int64_t rows, int64_t width, BFloat16* out,
                         int64_t out_row) {
  for (int64_t r = 0; r < rows; ++r, from += row, out += out_row) {
    if (step == 1) {
      memcpy(out, from, size_t(width) * sizeof *out);
    } else {
      for (int64_t k = 0; k < width; ++k) out[k] = from[k * step];
    }
    for (int64_t k = width; k < out_row; ++k) out[k] = {};
  }
}
template <class T>
__attribute__((noinline)) void read_rows(DType dtype, const void* from, int64_t row, int64_t step, int64_t rows,
                                         int64_t width, T* out, int64_t out_row) {
  if constexpr (sizeof(T) != sizeof(float)) {  // double, or bfloat16 as it is
    read_rows_of(static_cast<const T*>(from), row, step, rows, width, out, out_row);
  } else if (dtype == DType::kBFloat16) {
    read_rows_of(static_cast<const BFloat16*>(from), row, step, rows, width, out, out_row);
  } else if (dtype == DType::kFloat16) {
    read_rows_of(static_cast<const Float16*>(from), row, step, rows, width, out, out_row);
  } else {
    read_rows_of(static_cast<const float*>(from), row, step, rows, width, out, out_row);
  }
}

// A row of the mask as what is added to scores, in units of log 2. What is finite stays so: the lowest number is a
// common mask, and a row of nothing else has the mean of all values.
template <class T>
__attribute__((noinline)) void read_mask(DType dtype, const void* from, int64_t step, int64_t count, T* out) {
  if (dtype == DType::kBool) {
    const bool* seen = static_cast<const bool*>(from);
    for (int64_t k = 0; k < count; ++k) out[k] = seen[k * step] ? T(0) : -T(__builtin_inf());
    return;
  }
  using F = typename Work<T>::F;
  const F lowest(-std::numeric_limits<T>::max());
  read_rows<T>(dtype, from, 0, step, 1, count, out, 0);
  for (int64_t k = 0; k < count; k += kLanes<T>) {
    F x;
    load(out + k, x);
    // A NaN in the second argument passes, and so does -inf, which is less than the lowest number.
    store(out + k, select(less(x, lowest), x, larger(lowest, x * F(Constants<T>::kLog2E))));
  }
}

FASTGEN_FN int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kBool: return 1;
  }
  return 0;
}

// Calls body with an element of the dtype, one of those that are computed in T.
template <class T, class Body>
FASTGEN_FN void with_element(DType dtype, const Body& body) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return body(double());
  } else {
    switch (dtype) {
      case DType::kBFloat16: return body(BFloat16());
      case DType::kFloat16: return body(Float16());
      default: return body(float());
    }
  }
}

// Memory for the work of one unit, handed out piece by piece; with null, only counted.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up<int64_t>(count * int64_t(sizeof(T)), 64);
    return out;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// One head of one sequence.
template <class T>
struct AttentionHead {
  const char *query, *key, *value, *mask;  // where its rows begin
  int64_t queries, keys;
  int64_t shift;      // place of query 0 among the keys
  int64_t row;        // number of query 0 among the rows of lse
  int64_t first_key;  // number of key 0 among the keys that dropout counts
  T slope;            // of ALiBi, in units of log 2
};

template <class A_>
class Attention {
 protected:
  using A = A_;
  using T = typename A::T;
  using Element = typename A::Left;  // of either side of a product
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  using Head = AttentionHead<T>;
  static constexpr int kWidth = kLanes<T>, kVectors = 4, kDepth = A::kDepth;
  static constexpr int64_t kQueries = kVectors * kWidth;  // of a block
  static constexpr int64_t kKeys = 128;                   // of a block
  static constexpr T kLog2E = Constants<T>::kLog2E, kLn2 = T(0.69314718055994531);

  // A block of queries: `lanes` of them, the last ones behind `count` without meaning.
  struct Block {
    int64_t first, count;
    int vectors;
    int64_t lanes;
    int64_t place;  // of its first query among the keys
  };

  // Keys of a block that the vectors [begin, end) of its queries see, from a whole step of the depth on; whole: all of
  // them by all lanes.
  struct Strip {
    int64_t first;
    int64_t count;
    int begin, end;
    bool whole;
  };
  struct Strips {
    Strip strip[2 * (kKeys / kWidth) + 3];
    int count = 0;
    const Strip* begin() const { return strip; }
    const Strip* end() const { return strip + count; }
  };

  // A number of rows, known to the compiler.
  template <int kCount>
  struct Rows {
    static constexpr int value = kCount;
  };

  // Scratch of a block of scores.
  struct Extras {
    T* added;     // [keys][lanes] or, the same for all queries, [keys]: the mask; then the weights of dropout
    T* rows;      // [queries][kKeys]
    float* draw;  // [keys], where T is double
    T* tangent;   // [keys][lanes]: the hyperbolic tangents of softcap, where they are kept
  };

  explicit Attention(const AttentionParams& params)
      : p(params), size(element_size(params.dtype)), mask_size(element_size(params.mask_dtype)), key_(params.seed) {
    for (int i = 0; i < kWidth; ++i) lane_[i] = T(i);
  }

  // What a product of a query and a key is multiplied with before the softcap, or to be a score.
  T query_scale() const { return p.softcap > 0 ? T(p.scale / p.softcap) : T(p.scale) * kLog2E; }
  bool drops() const { return p.keep < (uint64_t(1) << 32); }

  int64_t queries_of(int64_t sequence) const {
    return p.query_starts == nullptr ? p.queries : p.query_starts[sequence + 1] - p.query_starts[sequence];
  }

  int64_t keys_of(int64_t sequence) const {
    return p.key_starts == nullptr ? p.keys : p.key_starts[sequence + 1] - p.key_starts[sequence];
  }

  // The sequence that a unit belongs to; `unit` becomes its number there.
  int64_t sequence_of(int64_t& unit, int64_t units_of_each) const {
    if (p.query_starts == nullptr) {
      const int64_t sequence = unit / units_of_each;
      unit -= sequence * units_of_each;
      return sequence;
    }
    int64_t low = 0, high = p.batch;  // first_units[low] <= unit < first_units[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (p.first_units[middle] <= unit ? low : high) = middle;
    }
    unit -= p.first_units[low];
    return low;
  }

  Head head(int64_t sequence, int64_t h) const {
    Head out;
    const int64_t kv = h / (p.heads / p.kv_heads);
    const bool ragged = p.query_starts != nullptr;
    const int64_t query_start = ragged ? p.query_starts[sequence] : 0, key_start = ragged ? p.key_starts[sequence] : 0;
    out.queries = queries_of(sequence);
    out.keys = keys_of(sequence);
    out.shift = p.lower_right ? out.keys - out.queries : 0;
    out.row = ragged ? h * p.queries + query_start : (sequence * p.heads + h) * p.queries;
    out.first_key = key_start;
    out.query = at(p.query, size, sequence, h, query_start);
    out.key = at(p.key, size, sequence, kv, key_start);
    out.value = at(p.value, size, sequence, kv, key_start);
    out.mask = p.mask.data == nullptr ? nullptr : at(p.mask, mask_size, sequence, h, 0);
    out.slope = p.slopes == nullptr
                    ? T(0)
                    : static_cast<const T*>(p.slopes)[sequence * p.slope_batch + h * p.slope_head] * kLog2E;
    return out;
  }

  static const char* at(const Tensor4& tensor, int64_t size, int64_t a, int64_t b, int64_t c) {
    return static_cast<const char*>(tensor.data) +
           (a * tensor.stride[0] + b * tensor.stride[1] + c * tensor.stride[2]) * size;
  }

  Block block(const Head& head, int64_t first) const {
    Block out;
    out.first = first;
    out.count = at_most(kQueries, head.queries - first);
    out.vectors = int((out.count + kWidth - 1) / kWidth);
    out.lanes = out.vectors * kWidth;
    out.place = first + head.shift;
    return out;
  }
  int64_t first_seen(const Block& b) const { return at_least(0, b.place - p.left); }
  int64_t end_seen(const Head& head, const Block& b) const { return at_most(head.keys, b.place + b.count + p.right); }

  // What the block sees of the keys [j, j + count).
  Strips seen(const Head& head, const Block& b, int64_t j, int64_t count) const {
    const int64_t begin = at_least(j, first_seen(b)) / kDepth * kDepth;
    return strips(b, begin, at_most(j + count, end_seen(head, b)));
  }
  // Cuts keys [j, end): where all lanes see all keys into one piece, at the edges of what they see into pieces as high
  // as a vector is wide, so that vectors which see none of one are left out.
  Strips strips(const Block& b, int64_t j, int64_t end) const {
    const int64_t first = b.place - p.left, last = b.place + p.right;  // what lane 0 sees; lane i sees i further
    const int64_t cut = last - (last % kDepth + kDepth) % kDepth;
    Strips out;
    while (j < end) {
      int64_t stop = end;
      if (j < first + b.lanes - 1) stop = at_most(stop, j + kWidth);
      stop = at_most(stop, j < cut ? cut : cut + ((j - cut) / kWidth + 1) * kWidth);
      Strip strip;
      strip.first = j;
      strip.count = stop - j;
      strip.begin = j > last ? int((j - last) / kWidth) : 0;
      strip.end = stop - 1 < first ? 0 : int(at_most(b.vectors, (stop - 1 - first) / kWidth + 1));
      strip.whole = stop - 1 <= last && j >= first + b.lanes - 1;
      if (strip.begin < strip.end) out.strip[out.count++] = strip;
      j = stop;
    }
    return out;
  }

  // Rows of a matrix of `width` columns from the first of the block on, transposed: a right side [width][lanes]. Lanes
  // behind `count` are zero. What is not dense rows of elements goes through staging: [kWidth][width in whole vectors].
  void pack_rows(const char* from, const int64_t (&stride)[4], int64_t width, const Block& b, Element* staging,
                 Element* out) const {
    const int64_t row = round_up<int64_t>(width, kWidth);
    const bool dense = size == int64_t(sizeof(Element)) && stride[3] == 1;
    for (int v = 0; v < b.vectors; ++v) {
      const int64_t rows = at_most(kWidth, b.count - v * kWidth);
      const char* at = from + (b.first + v * kWidth) * stride[2] * size;
      if (!dense) read_rows<Element>(p.dtype, at, stride[2], stride[3], rows, width, staging, row);
      const Element* pointers[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        pointers[i] = i >= rows ? nullptr
                      : dense   ? reinterpret_cast<const Element*>(at) + i * stride[2]
                                : staging + i * row;
      }
      A::pack(pointers, width, b.lanes, out + v * kWidth * kDepth);
    }
  }

  // Rows [first, first + count) as the left side of a product: where they stand, or, where they are not dense rows of
  // whole steps, copied. A copy costs a hundredth of a product; rows far apart would fight for the same lines of the
  // cache.
  StridedMatrix<Element> rows_of(const char* from, const int64_t (&stride)[4], int64_t width, int64_t first,
                                 int64_t count, Element* copy) const {
    from += first * stride[2] * size;
    if (size == int64_t(sizeof(Element)) && stride[3] == 1 && stride[2] == width && width % kDepth == 0) {
      return {reinterpret_cast<const Element*>(from), width, 1};
    }
    const int64_t row = round_up<int64_t>(width, kWidth);
    read_rows<Element>(p.dtype, from, stride[2], stride[3], count, width, copy, row);
    return {copy, row, 1};
  }

  // The columns of these rows as the left side of a product whose depth are the rows: where they stand or, in pairs, in
  // `copy`, [rows / 2][width][2].
  StridedMatrix<Element> columns_of(const StridedMatrix<Element>& rows, int64_t width, int64_t count,
                                    Element* copy) const {
    if constexpr (kDepth == 1) {
      return {rows.data, rows.step, rows.row};
    } else {
      const int64_t row = round_up<int64_t>(width, kWidth);
      A::pair_rows(rows.data, rows.row, 1, count, width, copy, row);
      return {copy, kDepth, row};
    }
  }

  // S^T = factor K Q^T on what the strips see; row 0 of s is key j.
  void multiply_seen(const Block& b, const Strips& seen, int64_t j, const StridedMatrix<Element>& k, const Element* q,
                     int64_t width, T factor, T* s) const {
    for (const Strip& strip : seen) {
      const int64_t row = strip.first - j, first = strip.begin * kWidth;
      multiply_strided<A>(strip.count, strip.end - strip.begin, {k.data + row * k.row, k.row, k.step},
                          q + first * kDepth, b.lanes * kDepth, width, factor, false, s + row * b.lanes + first,
                          b.lanes);
    }
  }

  // out += left . s on what a strip sees, where s, [keys][lanes], has become a right side in place; `left` are columns
  // whose depth are the keys.
  void add_seen(const Block& b, const Strip& strip, int64_t j, const StridedMatrix<Element>& left, int64_t width,
                const T* s, T* out) const {
    const int64_t row = strip.first - j, first = strip.begin * kWidth;
    const Element* right = reinterpret_cast<const Element*>(s) + row * b.lanes + first * kDepth;
    multiply_strided<A>(width, strip.end - strip.begin, {left.data + row * left.step, left.row, left.step}, right,
                        b.lanes * kDepth, strip.count, T(1), true, out + first, b.lanes);
  }

  // Calls body(F& score, distance, place in the block, key in the block) for all scores that the strips see, a vector
  // at a time.
  template <class Body>
  FASTGEN_MEMBER void for_scores(const Block& b, const Strips& seen, int64_t j, T* s, const Body& body) const {
    for (const Strip& strip : seen) {
      for (int v = strip.begin; v < strip.end; ++v) {
        F lane;
        load(lane_, lane);
        const F place = lane + F(T(b.place - strip.first + v * kWidth));
        for (int64_t k = 0; k < strip.count; ++k) {
          const int64_t key = strip.first - j + k, i = key * b.lanes + v * kWidth;
          F score;
          load(s + i, score);
          body(score, place - F(T(k)), i, key);
          store(s + i, score);
        }
      }
    }
  }

  // From products to scores: softcap, mask, ALiBi, what is not seen.
  __attribute__((noinline)) void adjust(const Head& head, const Block& b, const Strips& seen, int64_t j, int64_t count,
                                        T* s, const Extras& extras) const {
    if (p.softcap > 0) {
      const F cap(T(p.softcap) * kLog2E);
      for_scores(b, seen, j, s, [&](F& score, F, int64_t i, int64_t) {
        const F t = hyperbolic_tangent<T, U>(score);
        if (extras.tangent != nullptr) store(extras.tangent + i, t);
        score = t * cap;
      });
    }
    if (head.mask != nullptr) {
      const char* from = head.mask + j * p.mask.stride[3] * mask_size;
      if (p.mask.stride[2] == 0) {  // the same for all queries
        read_mask<T>(p.mask_dtype, from, p.mask.stride[3], count, extras.added);
        for_scores(b, seen, j, s, [&](F& score, F, int64_t, int64_t key) { score = score + F(extras.added[key]); });
      } else {
        for (int64_t i = 0; i < b.count; ++i) {
          read_mask<T>(p.mask_dtype, from + (b.first + i) * p.mask.stride[2] * mask_size, p.mask.stride[3], count,
                       extras.rows + i * kKeys);
        }
        transpose_rows(b, count, extras);
        for_scores(b, seen, j, s, [&](F& score, F, int64_t i, int64_t) {
          F added;
          load(extras.added + i, added);
          score = score + added;
        });
      }
    }
    if (head.slope != T(0)) {
      const F minus_slope(-head.slope);
      for_scores(b, seen, j, s, [&](F& score, F distance, int64_t, int64_t) {
        score = multiply_add(absolute(distance), minus_slope, score);
      });
    }
    for (const Strip& strip : seen) {
      if (!strip.whole) hide(b, strip, j, s);
    }
  }

  // Sets what is not seen to -inf. Places relative to the ends of the window are small where an end is in sight: exact
  // in T whatever the size of the window.
  void hide(const Block& b, const Strip& strip, int64_t j, T* s) const {
    const int64_t first = b.place - strip.first;
    const F unseen(-T(__builtin_inf())), zero(T(0));
    F lane;
    load(lane_, lane);
    for (int v = strip.begin; v < strip.end; ++v) {
      const F behind = lane + F(T(first - p.left + v * kWidth)), ahead = lane + F(T(first + p.right + v * kWidth));
      for (int64_t k = 0; k < strip.count; ++k) {
        T* at = s + (strip.first - j + k) * b.lanes + v * kWidth;
        const F key{T(k)};
        F score;
        load(at, score);
        store(at, select(less(zero, behind - key), unseen, select(less(ahead - key, zero), unseen, score)));
      }
    }
  }

  // extras.rows, [queries][kKeys], to extras.added, [keys][lanes]; lanes without a query are zero.
  void transpose_rows(const Block& b, int64_t count, const Extras& extras) const {
    for (int v = 0; v < b.vectors; ++v) {
      const T* rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        rows[i] = v * kWidth + i < b.count ? extras.rows + (v * kWidth + i) * kKeys : nullptr;
      }
      pack_transposed<F>(rows, count, b.lanes, extras.added + v * kWidth);
    }
  }

  // extras.added: 1 where a weight is kept, else 0.
  void draw(const Head& head, const Block& b, int64_t j, int64_t count, const Extras& extras) const {
    RandomParams bernoulli{};
    bernoulli.a = double(p.keep);
    for (int64_t i = 0; i < b.count; ++i) {
      const uint64_t element =
          p.offset + uint64_t(head.row + b.first + i) * uint64_t(p.keys) + uint64_t(head.first_key + j);
      if constexpr (sizeof(T) == sizeof(float)) {
        fill<float>(extras.rows + i * kKeys, element, count, key_, Bernoulli(bernoulli));
      } else {
        fill<float>(extras.draw, element, count, key_, Bernoulli(bernoulli));
        for (int64_t k = 0; k < count; ++k) extras.rows[i * kKeys + k] = T(extras.draw[k]);
      }
    }
    transpose_rows(b, count, extras);
  }

  // Sizes of a block in a sequence so long at most: scratch of a short one stays small.
  static int64_t block_keys(int64_t keys) { return at_most(kKeys, round_up<int64_t>(keys, kWidth)); }
  static int64_t block_lanes(int64_t queries) { return at_most(kQueries, round_up<int64_t>(queries, kWidth)); }

  Extras take_extras(Scratch& scratch, bool keep_tangent) const {
    Extras out{};
    if (p.mask.data != nullptr || drops()) {
      out.added = scratch.take<T>(kKeys * kQueries);
      out.rows = scratch.take<T>(kQueries * kKeys);
      if (sizeof(T) != sizeof(float)) out.draw = scratch.take<float>(kKeys);
    }
    if (p.softcap > 0 && keep_tangent) out.tangent = scratch.take<T>(kKeys * kQueries);
    return out;
  }

  const AttentionParams& p;
  const int64_t size, mask_size;  // bytes of an element
  alignas(64) T lane_[kWidth];    // 0, 1, 2, ...

 private:
  PhiloxKey key_;
};

template <class A_>
class AttentionForward : Attention<A_> {
  using Base = Attention<A_>;
  using Base::kDepth;
  using Base::kKeys;
  using Base::kQueries;
  using Base::kVectors;
  using Base::kWidth;
  using Base::p;
  using typename Base::A;
  using typename Base::Block;
  using typename Base::Element;
  using typename Base::Extras;
  using typename Base::F;
  using typename Base::Head;
  template <int kCount>
  using Rows = typename Base::template Rows<kCount>;
  using typename Base::Strip;
  using typename Base::Strips;
  using typename Base::T;
  using typename Base::U;

  static constexpr int kGroup = 4;  // blocks of queries that pass over the keys together

  // A block at work. O^T and the sums are relative to 2^top.
  struct State : Block {
    Element* q;        // [D][lanes]
    T *o, *top, *sum;  // [Dv][lanes], [lanes]
  };

  struct Memory {
    State state[kGroup];
    Element *key, *value, *columns, *staging;
    T* s;
    Extras extras;
  };

 public:
  explicit AttentionForward(const AttentionParams& params) : Base(params) {}

  AttentionSizes sizes() const {
    AttentionSizes out{};
    out.units = p.batch * p.heads * groups(p.queries);
    out.unit_queries = kGroup * kQueries;
    Scratch scratch(nullptr);
    take(scratch);
    out.scratch = scratch.used();
    return out;
  }

  void run(int64_t unit, void* memory) const {
    const int64_t sequence = this->sequence_of(unit, p.heads * groups(p.queries));
    const int64_t per_head = groups(this->queries_of(sequence));
    Scratch scratch(memory);
    run(sequence, unit / per_head, unit % per_head * kGroup * kQueries, take(scratch));
  }
  void join(int64_t) const {}

 private:
  static int64_t groups(int64_t queries) { return (queries + kGroup * kQueries - 1) / (kGroup * kQueries); }

  Memory take(Scratch& scratch) const {
    Memory m{};
    const int64_t width = round_up<int64_t>(p.width, kWidth), value_width = round_up<int64_t>(p.value_width, kWidth);
    const int64_t keys = this->block_keys(p.keys), lanes = this->block_lanes(p.queries);
    for (int i = 0; i < kGroup && (i == 0 || i * kQueries < p.queries); ++i) {
      State& state = m.state[i];
      state.q = scratch.take<Element>(width * lanes);
      state.o = scratch.take<T>(value_width * lanes);
      state.top = scratch.take<T>(lanes);
      state.sum = scratch.take<T>(lanes);
    }
    m.key = scratch.take<Element>(keys * width);
    m.value = scratch.take<Element>(keys * value_width);
    m.columns = scratch.take<Element>(kDepth == 1 ? 0 : keys * value_width);
    m.staging = scratch.take<Element>(kWidth * width);
    m.s = scratch.take<T>(keys * lanes);
    m.extras = this->take_extras(scratch, false);
    return m;
  }

  void run(int64_t sequence, int64_t h, int64_t first, Memory m) const {
    const Head head = this->head(sequence, h);
    int count = 0;
    int64_t begin = head.keys, end = 0;
    for (; count < kGroup && first + count * kQueries < head.queries; ++count) {
      State& state = m.state[count];
      static_cast<Block&>(state) = this->block(head, first + count * kQueries);
      this->pack_rows(head.query, p.query.stride, p.width, state, m.staging, state.q);
      for (int64_t i = 0; i < p.value_width * state.lanes; ++i) state.o[i] = T(0);
      for (int64_t i = 0; i < state.lanes; ++i) state.top[i] = -T(__builtin_inf());
      for (int64_t i = 0; i < state.lanes; ++i) state.sum[i] = T(0);
      begin = at_most(begin, this->first_seen(state));
      end = at_least(end, this->end_seen(head, state));
    }
    for (int64_t j = begin / kKeys * kKeys; j < end; j += kKeys) {
      const int64_t keys = at_most(kKeys, head.keys - j);
      const StridedMatrix<Element> key = this->rows_of(head.key, p.key.stride, p.width, j, keys, m.key);
      const StridedMatrix<Element> value = this->rows_of(head.value, p.value.stride, p.value_width, j, keys, m.value);
      const StridedMatrix<Element> columns = this->columns_of(value, p.value_width, keys, m.columns);
      for (int i = 0; i < count; ++i) pass(head, m.state[i], j, keys, key, columns, m);
    }
    for (int i = 0; i < count; ++i) finish(head, sequence, h, m.state[i]);
  }

  // A block of queries passes over the keys [j, j + count); `value` are their columns.
  void pass(const Head& head, State& state, int64_t j, int64_t count, const StridedMatrix<Element>& key,
            const StridedMatrix<Element>& value, const Memory& m) const {
    const Strips seen = this->seen(head, state, j, count);
    if (seen.count == 0) return;
    this->multiply_seen(state, seen, j, key, state.q, p.width, this->query_scale(), m.s);
    this->adjust(head, state, seen, j, count, m.s, m.extras);
    if (this->drops()) {
      this->draw(head, state, j, count, m.extras);
      weigh<true>(state, seen, j, m.s, m.extras.added);
    } else {
      weigh<false>(state, seen, j, m.s, nullptr);
    }
    for (const Strip& strip : seen) this->add_seen(state, strip, j, value, p.value_width, m.s, state.o);
  }

  // Scores to weights, 2^(score - top), as the right side of a product, in place. Where a top rises, what was summed up
  // under the old one fades. kept: [keys][lanes], 1 or 0.
  template <bool kDrops>
  __attribute__((noinline)) void weigh(State& state, const Strips& seen, int64_t j, T* s, const T* kept) const {
    const F lowest(-std::numeric_limits<T>::max());
    for (int v = 0; v < state.vectors; ++v) {
      F old, sum, highest[4];
      load(state.top + v * kWidth, old);
      load(state.sum + v * kWidth, sum);
      for (F& top : highest) top = old;
      for_rows(seen, v, j, [&](auto rows, int64_t row) {
        FASTGEN_UNROLL
        for (int i = 0; i < rows.value; ++i) {
          F score;
          load(s + (row + i) * state.lanes + v * kWidth, score);
          highest[i] = larger(highest[i], score);
        }
      });
      const F top = larger(larger(highest[0], highest[1]), larger(highest[2], highest[3]));
      store(state.top + v * kWidth, top);
      // A query that has seen no key has no top: its weights are 2^-inf.
      const F base = select(less(top, lowest), F(T(0)), top);
      const F fade = select(less(old, lowest), F(T(1)), power_of_2<T, U>(old - base));
      F sums[4];  // of this block: one chain over very many keys would lose what it adds
      for (F& part : sums) part = F(T(0));
      for_rows(seen, v, j, [&](auto rows, int64_t row) {
        constexpr int kSteps = (rows.value + kDepth - 1) / kDepth;
        F weight[kSteps][kDepth];
        FASTGEN_UNROLL
        for (int i = 0; i < kSteps * kDepth; ++i) {
          F& to = weight[i / kDepth][i % kDepth];
          if (i >= rows.value) {
            to = F(T(0));
            continue;
          }
          const int64_t at = (row + i) * state.lanes + v * kWidth;
          F score;
          load(s + at, score);
          to = power_of_2<T, U>(score - base);
          sums[i] = sums[i] + to;
          if constexpr (kDrops) {
            F keep;
            load(kept + at, keep);
            to = to * keep;
          }
        }
        FASTGEN_UNROLL
        for (int i = 0; i < kSteps; ++i) {
          A::put_step(weight[i],
                      reinterpret_cast<Element*>(s) + (row + i * kDepth) * state.lanes + v * kWidth * kDepth);
        }
      });
      store(state.sum + v * kWidth, multiply_add(sum, fade, (sums[0] + sums[1]) + (sums[2] + sums[3])));
      if (fastgen::sum(F(T(1)) - fade) != T(0)) {
        for (int64_t k = 0; k < p.value_width; ++k) {
          F o;
          load(state.o + k * state.lanes + v * kWidth, o);
          store(state.o + k * state.lanes + v * kWidth, o * fade);
        }
      }
    }
  }

  // Calls body(Rows of 1 to 4, the first of them) for the rows of a block of scores that vector v sees, in whole steps
  // of the depth but for the last.
  template <class Body>
  static FASTGEN_MEMBER void for_rows(const Strips& seen, int v, int64_t j, const Body& body) {
    for (const Strip& strip : seen) {
      if (v < strip.begin || v >= strip.end) continue;
      int64_t row = strip.first - j;
      const int64_t end = row + strip.count;
      for (; row + 4 <= end; row += 4) body(Rows<4>(), row);
      for (; row + kDepth <= end; row += kDepth) body(Rows<kDepth>(), row);
      if (row < end) body(Rows<1>(), row);
    }
  }

  // O / sum, and the logarithm of the sum of the exponentials.
  void finish(const Head& head, int64_t sequence, int64_t h, const State& state) const {
    T* lse = static_cast<T*>(p.lse) + head.row + state.first;
    const int64_t query_start = p.query_starts == nullptr ? 0 : p.query_starts[sequence];
    for (int v = 0; v < state.vectors; ++v) {
      const int count = int(at_most(kWidth, state.count - v * kWidth));
      F top, sum;
      load(state.top + v * kWidth, top);
      load(state.sum + v * kWidth, sum);
      const auto none = less(sum, F(T(0.5)));  // the top alone weighs 1
      const F share = select(none, F(T(0)), F(T(p.kept_weight)) / sum);
      // The logarithm is for normal numbers: a NaN has to be led around it.
      const F log_sum = multiply_add(top, F(Base::kLn2), logarithm<T, U>(sum)) + (sum - sum);
      put(lse + v * kWidth, select(none, F(-T(__builtin_inf())), log_sum), count);
      const auto write = [&](auto storage) {
        using Storage = decltype(storage);
        for (int64_t k = 0; k < p.value_width; k += kWidth) {
          F square[kWidth];
          FASTGEN_UNROLL
          for (int i = 0; i < kWidth; ++i) {
            load(state.o + (k + i) * state.lanes + v * kWidth, square[i]);
            square[i] = square[i] * share;
          }
          transpose(square);
          const int columns = int(at_most(kWidth, p.value_width - k));
          for (int i = 0; i < count; ++i) {
            char* out =
                const_cast<char*>(this->at(p.out, this->size, sequence, h, query_start + state.first + v * kWidth + i));
            put(reinterpret_cast<Storage*>(out) + k, square[i], columns);
          }
        }
      };
      with_element<T>(p.dtype, write);
    }
  }
};

}  // namespace
}  // namespace fastgen
