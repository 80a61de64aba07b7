// Attention of a few queries to many keys, as a step of generation has it: bound by the bytes of keys and values, which
// are read once, where they stand. Vectors run along the width of a row, and along the keys in a row of scores.
//
// The queries of all heads that read one key head go together. A unit is a chunk of the keys of a key head; where there
// are several, each leaves its sums, and these are joined in order.
#pragma once

#include "attention.inl"
#include "dot.inl"

namespace fastgen {
namespace {

template <class Storage>
class AttentionFew : protected Attention<Multiply<typename WorkType<Storage>::T>> {
 protected:
  using T = typename WorkType<Storage>::T;
  using Base = Attention<Multiply<T>>;
  using Base::kLog2E;
  using Base::kWidth;
  using Base::p;
  using typename Base::F;
  using typename Base::Head;
  using typename Base::U;

  static constexpr int kRows = kDotRows;
  static constexpr int kVectors = Isa::kSums / kRows;  // of values at a time
  static constexpr int64_t kBlock = 256;               // keys whose scores are made at once
  static constexpr int64_t kUnitsWanted = 16, kLeastChunk = 512;

  // A query of one of the heads, and what is summed up for it, relative to 2^top.
  struct Row {
    Head head;
    int64_t h, i;
    T *scores, *out;  // [kBlock], [Dv in whole vectors]
    T top, sum;
  };

 public:
  explicit AttentionFew(const AttentionParams& params) : Base(params) {}

  // By shape and strides alone; dropout is left to the other way.
  static bool serves(const AttentionParams& p) {
    return p.query_starts == nullptr && p.batch * p.kv_heads * p.queries > 0 &&
           p.queries * (p.heads / p.kv_heads) <= kRows && p.keep == uint64_t(1) << 32 && p.query.stride[3] == 1 &&
           p.key.stride[3] == 1 && p.value.stride[3] == 1;
  }

  AttentionSizes sizes() const {
    Scratch scratch(nullptr);
    Row rows[kRows];
    take(scratch, rows);
    const int64_t sums = chunks() > 1 ? p.batch * p.heads * p.queries * chunks() * sums_size() * int64_t(sizeof(T)) : 0;
    AttentionSizes out{};
    out.units = p.batch * p.kv_heads * chunks();
    out.scratch = scratch.used();
    out.join_units = sums > 0 ? p.batch * p.heads : 0;
    out.sums = sums;
    return out;
  }

  void run(int64_t unit, void* memory) const {
    const int64_t sequence = unit / (p.kv_heads * chunks()), kv = unit / chunks() % p.kv_heads, c = unit % chunks();
    const int64_t group = p.heads / p.kv_heads;
    Scratch scratch(memory);
    Row rows[kRows];
    take(scratch, rows);
    const Head first = this->head(sequence, kv * group);
    int64_t place[kRows];  // of the queries, from that of the first one on
    int count = 0;
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      for (int64_t i = 0; i < p.queries; ++i, ++count) {
        Row& row = rows[count];
        row.head = h == kv * group ? first : this->head(sequence, h);
        row.h = h;
        row.i = i;
        row.top = -T(__builtin_inf());
        row.sum = T(0);
        for (int64_t k = 0; k < p.value_width; k += kWidth) store(row.out + k, F(T(0)));
        place[count] = (h - kv * group) * p.query.stride[1] + i * p.query.stride[2];
      }
    }
    const int64_t begin = seen_begin() + c * chunk(), end = at_most(seen_end(), begin + chunk());
    for (int64_t j = begin; j < end; j += kBlock) {
      pass(first, place, rows, count, j, at_most(kBlock, end - j));
    }
    for (int r = 0; r < count; ++r) {
      if (chunks() == 1) {
        write(sequence, rows[r], rows[r].out, rows[r].top, rows[r].sum);
        continue;
      }
      T* sums = static_cast<T*>(p.sums) + ((rows[r].head.row + rows[r].i) * chunks() + c) * sums_size();
      sums[0] = rows[r].top;
      sums[1] = rows[r].sum;
      memcpy(sums + 2, rows[r].out, sizeof(T) * size_t(p.value_width));
    }
  }

  // Joins the sums of the chunks, for one head; in place.
  void join(int64_t unit) const {
    Row row;
    row.h = unit % p.heads;
    row.head = this->head(unit / p.heads, row.h);
    for (row.i = 0; row.i < p.queries; ++row.i) {
      T* sums = static_cast<T*>(p.sums) + (row.head.row + row.i) * chunks() * sums_size();
      T top = sums[0];
      for (int64_t c = 1; c < chunks(); ++c) top = sums[c * sums_size()] > top ? sums[c * sums_size()] : top;
      T total = T(0);
      for (int64_t c = 0; c < chunks(); ++c) {
        const T* from = sums + c * sums_size();
        const T fade = fade_of(from[0], top);
        total += from[1] * fade;
        for (int64_t k = 2; k < sums_size(); ++k) sums[k] = (c == 0 ? T(0) : sums[k]) + from[k] * fade;
      }
      write(unit / p.heads, row, sums + 2, top, total);
    }
  }

 private:
  int64_t sums_size() const { return p.value_width + 2; }
  int64_t chunk() const {
    const int64_t heads = p.batch * p.kv_heads, wanted = (kUnitsWanted + heads - 1) / heads;
    return at_least(kLeastChunk, round_up<int64_t>((seen_end() - seen_begin() + wanted - 1) / wanted, kBlock));
  }
  int64_t chunks() const { return at_least(1, (seen_end() - seen_begin() + chunk() - 1) / chunk()); }

 protected:
  // The keys that any of the queries sees.
  int64_t shift() const { return p.lower_right ? p.keys - p.queries : 0; }
  int64_t seen_begin() const { return at_most(p.keys, at_least(0, shift() - p.left)); }
  int64_t seen_end() const { return at_least(seen_begin(), at_most(p.keys, shift() + p.queries + p.right)); }

 private:
  void take(Scratch& scratch, Row (&rows)[kRows]) const {
    for (Row& row : rows) row.out = scratch.template take<T>(round_up<int64_t>(p.value_width, kWidth));
    T* scores = scratch.template take<T>(kRows * kBlock);
    for (int r = 0; r < kRows; ++r) rows[r].scores = scores + r * kBlock;
  }

  static T first_lane(F x) {
    T lanes[kWidth];
    store(lanes, x);
    return lanes[0];
  }
  // What sums relative to 2^old are multiplied with to be relative to 2^top; nothing is summed up below a top of -inf.
  static T fade_of(T old, T top) {
    return old == -T(__builtin_inf()) ? T(1) : first_lane(power_of_2<T, U>(F(old - top)));
  }

  // The rows pass over the keys [j, j + count).
  void pass(const Head& first, const int64_t* place, Row (&rows)[kRows], int number, int64_t j, int64_t count) const {
    const int64_t key_row = p.key.stride[2], value_row = p.value.stride[2];
    const Storage* keys = reinterpret_cast<const Storage*>(first.key) + j * key_row;
    const Term<Storage> term[1] = {
        {{keys, key_row, nullptr}, {reinterpret_cast<const Storage*>(first.query), 1, place}, p.width}};
    dot_tile(term, 0, number, 0, count, rows[0].scores, kBlock);
    T fade[kRows];
    for (int r = 0; r < number; ++r) {
      adjust(rows[r], j, count);
      fade[r] = weigh(rows[r], count);
    }
    const Storage* values = reinterpret_cast<const Storage*>(first.value) + j * value_row;
    int64_t k = 0;
    for (; k + kVectors * kWidth <= p.value_width; k += kVectors * kWidth) {
      add_values<kVectors>(number, rows, fade, values + k, value_row, count, k, kWidth);
    }
    for (; k < p.value_width; k += kWidth) {
      add_values<1>(number, rows, fade, values + k, value_row, count, k, int(at_most(kWidth, p.value_width - k)));
    }
  }

 protected:
  // Products to scores in units of log 2; those of keys that are not seen, and up to a whole vector behind the last,
  // are -inf.
  __attribute__((noinline)) void adjust(const Row& row, int64_t j, int64_t count) const {
    const int64_t at = row.i + row.head.shift;
    const int64_t begin = at_most(count, at_least(0, at - p.left - j));
    const int64_t end = at_least(begin, at_most(count, at + p.right + 1 - j));
    const F scale(this->query_scale()), cap(T(p.softcap) * Base::kLog2E);
    const F minus_slope(-row.head.slope);
    alignas(64) T added[kBlock];
    if (row.head.mask != nullptr) {
      read_mask<T>(p.mask_dtype, row.head.mask + (row.i * p.mask.stride[2] + j * p.mask.stride[3]) * this->mask_size,
                   p.mask.stride[3], count, added);
    }
    F lane;
    load(this->lane_, lane);
    for (int64_t k = 0; k < count; k += kWidth) {
      F score;
      load(row.scores + k, score);
      score = score * scale;
      if (p.softcap > 0) score = hyperbolic_tangent<T, U>(score) * cap;
      if (row.head.mask != nullptr) {
        F x;
        load(added + k, x);
        score = score + x;
      }
      if (row.head.slope != T(0)) {
        score = multiply_add(absolute(F(T(at - j - k)) - lane), minus_slope, score);
      }
      store(row.scores + k, score);
    }
    for (int64_t k = 0; k < begin; ++k) row.scores[k] = -T(__builtin_inf());
    for (int64_t k = end; k < round_up<int64_t>(count, kWidth); ++k) row.scores[k] = -T(__builtin_inf());
  }

 private:
  // Scores to weights, 2^(score - top). Returns the factor for what was summed up under the old top.
  __attribute__((noinline)) T weigh(Row& row, int64_t count) const {
    F highest(row.top);
    for (int64_t k = 0; k < count; k += kWidth) {
      F score;
      load(row.scores + k, score);
      highest = larger(highest, score);
    }
    T lanes[kWidth];
    store(lanes, highest);
    T top = lanes[0];
    for (int i = 1; i < kWidth; ++i) top = lanes[i] > top ? lanes[i] : top;
    const T fade = fade_of(row.top, top);
    const F base(top == -T(__builtin_inf()) ? T(0) : top);
    F sums(T(0));
    for (int64_t k = 0; k < count; k += kWidth) {
      F score;
      load(row.scores + k, score);
      const F weight = power_of_2<T, U>(score - base);
      store(row.scores + k, weight);
      sums = sums + weight;
    }
    row.top = top;
    row.sum = row.sum * fade + sum(sums);
    return fade;
  }

  // out = fade out + weights . values, for columns [k, k + vectors).
  template <int kCount, int kMost = kRows>
  static void add_values(int number, Row (&rows)[kRows], const T* fade, const Storage* values, int64_t value_row,
                         int64_t count, int64_t k, int columns) {
    if constexpr (kMost > 1) {
      if (number < kMost) {
        return add_values<kCount, kMost - 1>(number, rows, fade, values, value_row, count, k, columns);
      }
    }
    add_values_of<kCount, kMost>(rows, fade, values, value_row, count, k, columns);
  }
  template <int kCount, int kNumber>
  static __attribute__((noinline)) void add_values_of(Row (&rows)[kRows], const T* fade, const Storage* values,
                                                      int64_t value_row, int64_t count, int64_t k, int columns) {
    F out[kNumber][kCount];
    const T* weights[kNumber];
    FASTGEN_UNROLL
    for (int r = 0; r < kNumber; ++r) {
      weights[r] = rows[r].scores;
      FASTGEN_UNROLL
      for (int v = 0; v < kCount; ++v) {
        load(rows[r].out + k + v * kWidth, out[r][v]);
        out[r][v] = out[r][v] * F(fade[r]);
      }
    }
    for (int64_t j = 0; j < count; ++j, values += value_row) {
      F value[kCount];
      FASTGEN_UNROLL
      for (int v = 0; v < kCount; ++v) {
        if constexpr (kCount == 1) {
          value[v] = fastgen::take<F>(values, columns);
        } else {
          load(values + v * kWidth, value[v]);
        }
      }
      FASTGEN_UNROLL
      for (int r = 0; r < kNumber; ++r) {
        const F weight(weights[r][j]);
        FASTGEN_UNROLL
        for (int v = 0; v < kCount; ++v) out[r][v] = multiply_add(weight, value[v], out[r][v]);
      }
    }
    FASTGEN_UNROLL
    for (int r = 0; r < kNumber; ++r) {
      FASTGEN_UNROLL
      for (int v = 0; v < kCount; ++v) store(rows[r].out + k + v * kWidth, out[r][v]);
    }
  }

  // out / sum, and the logarithm of the sum of the exponentials.
  void write(int64_t sequence, const Row& row, const T* sums, T top, T sum) const {
    const bool none = sum < T(0.5);  // the top alone weighs 1
    const F share(none ? T(0) : T(1) / sum);
    Storage* out = reinterpret_cast<Storage*>(const_cast<char*>(this->at(p.out, this->size, sequence, row.h, row.i)));
    for (int64_t k = 0; k < p.value_width; k += kWidth) {
      const int columns = int(at_most(kWidth, p.value_width - k));
      put(out + k, fastgen::take<F>(sums + k, columns) * share, columns);
    }
    const T lse = top * Base::kLn2 + first_lane(logarithm<T, U>(F(sum))) + (sum - sum);  // a NaN stays one
    static_cast<T*>(p.lse)[row.head.row + row.i] = none ? -T(__builtin_inf()) : lse;
  }
};

}  // namespace
}  // namespace fastgen
