// The backward pass of attention. As in the forward pass, lanes are queries: S^T = K Q^T and dP^T = V dO^T are products
// of rows as they stand with transposed blocks, and so is dQ^T += K^T dS^T; dV += P^T dO and dK += dS^T Q have the rows
// of P^T and dS^T on their left. Only Q and dO are packed, once a head, and scores are made again a block at a time.
//
// A unit is a chunk of the keys of one key head: it owns the gradients of these keys and values, summed over the query
// heads that read them. Where there are several chunks, each has sums of its own for the gradients of the queries.
#pragma once

#include "attention.inl"

namespace fastgen {
namespace {

template <class T>
class AttentionBackward : Attention<T> {
  using Base = Attention<T>;
  using Base::kKeys;
  using Base::kQueries;
  using Base::kVectors;
  using Base::kWidth;
  using Base::p;
  using typename Base::A;
  using typename Base::Block;
  using typename Base::Extras;
  using typename Base::F;
  using typename Base::Head;
  using typename Base::Strip;
  using typename Base::Strips;
  using typename Base::U;

  // A block of queries. Panels are [width][lanes], rows are those of the head from the block on.
  struct State : Block {
    T *q, *go, *dq;  // panels
    T *lse, *delta;  // [lanes]: in units of log 2; dO . O - d lse
    StridedMatrix<T> q_rows, go_rows;
  };

  // The blocks of one head, and the gradients of a chunk of keys.
  struct Memory {
    T *q, *go, *dq, *q_rows, *go_rows, *lse, *delta;
    T *dk, *dv;  // [chunk][width]
    T *key, *value, *s, *ds, *staging, *out;
    Extras extras;
  };

 public:
  explicit AttentionBackward(const AttentionBackwardParams& params) : Base(params), g(params) {}

  AttentionBackwardSizes sizes() const {
    AttentionBackwardSizes out{0, 0, 0, 0};
    out.units = p.batch * p.kv_heads * chunks(p.keys);
    out.mask_units = g.grad_mask == nullptr ? 0 : g.mask_size[0] * g.mask_size[1] * mask_blocks(2) * mask_blocks(3);
    Scratch scratch(nullptr);
    take(scratch, g.most_queries, at_most(g.chunk, g.most_keys));
    out.scratch = scratch.used();
    Scratch mask_scratch(nullptr);
    take(mask_scratch, at_most(g.most_queries, kQueries), kKeys);
    out.mask_scratch = mask_scratch.used();
    return out;
  }

  void run(int64_t unit, void* memory) const {
    const int64_t sequence = this->sequence_of(unit, p.kv_heads * chunks(p.keys));
    const int64_t per_head = chunks(this->keys_of(sequence));
    Scratch scratch(memory);
    run(sequence, unit / per_head, unit % per_head, take(scratch, g.most_queries, at_most(g.chunk, g.most_keys)));
  }

  // The gradient of a piece of the mask, [kQueries] queries by [kKeys] keys, or all of them where it is broadcast:
  // summed over what it is added to, in order.
  void run_mask(int64_t unit, void* memory) const {
    Scratch scratch(memory);
    const Memory m = take(scratch, at_most(g.most_queries, kQueries), kKeys);
    const int64_t j_blocks = mask_blocks(3), i_blocks = mask_blocks(2);
    const int64_t bj = unit % j_blocks, bi = unit / j_blocks % i_blocks;
    const int64_t mask_h = unit / (j_blocks * i_blocks) % g.mask_size[1];
    const int64_t mask_b = unit / (j_blocks * i_blocks * g.mask_size[1]);
    const int64_t size = this->mask_size;

    T* sums = m.dk;  // [kKeys][kQueries]
    for (int64_t i = 0; i < kKeys * kQueries; ++i) sums[i] = T(0);
    const auto range = [](int64_t size, int64_t at, int64_t all, auto body) {
      for (int64_t i = size == 1 ? 0 : at; i < (size == 1 ? all : at + 1); ++i) body(i);
    };
    range(g.mask_size[0], mask_b, p.batch, [&](int64_t b) {
      range(g.mask_size[1], mask_h, p.heads, [&](int64_t h) {
        const Head head = this->head(b, h);
        range(g.mask_size[2], bi, (p.queries + kQueries - 1) / kQueries, [&](int64_t i) {
          State state = this->state(head, b, h, i * kQueries, m, 0);
          range(g.mask_size[3], bj, (p.keys + kKeys - 1) / kKeys, [&](int64_t jb) {
            const int64_t j = jb * kKeys, keys = at_most(kKeys, p.keys - j);
            const Strips seen = this->seen(head, state, j, keys);
            if (seen.count == 0) return;
            gradient_of_scores(head, state, seen, j, keys, rows(head.key, p.key, p.width, j, keys, m.key),
                               rows(head.value, p.value, p.value_width, j, keys, m.value), m);
            this->for_scores(state, seen, j, m.ds, [&](F& ds, F, int64_t at, int64_t key) {
              T* to = sums + at + key * (kQueries - state.lanes);
              F sum;
              load(to, sum);
              store(to, sum + ds);
            });
          });
        });
      });
    });

    // Turned to rows, and these summed where the mask has one row or one column.
    const int64_t first_i = g.mask_size[2] == 1 ? 0 : bi * kQueries, first_j = g.mask_size[3] == 1 ? 0 : bj * kKeys;
    const int64_t keys = g.mask_size[3] == 1 ? kKeys : at_most(kKeys, p.keys - first_j);
    for (int64_t k = 0; k < kKeys; k += kWidth) {
      const T* from[kWidth];
      for (int i = 0; i < kWidth; ++i) from[i] = sums + (k + i) * kQueries;
      pack_transposed<F>(from, kQueries, kKeys, m.extras.rows + k);
    }
    if (g.mask_size[2] == 1) {
      for (int64_t i = 1; i < kQueries; ++i) {
        for (int64_t k = 0; k < kKeys; ++k) m.extras.rows[k] += m.extras.rows[i * kKeys + k];
      }
    }
    const int64_t count = g.mask_size[2] == 1 ? 1 : at_most(kQueries, p.queries - first_i);
    for (int64_t i = 0; i < count; ++i) {
      T* row = m.extras.rows + i * kKeys;
      if (g.mask_size[3] == 1) {
        for (int64_t k = 1; k < kKeys; ++k) row[0] += row[k];
      }
      const int64_t at = ((mask_b * g.mask_size[1] + mask_h) * g.mask_size[2] + first_i + i) * g.mask_size[3] + first_j;
      write_row(p.mask_dtype, row, g.mask_size[3] == 1 ? 1 : keys, static_cast<char*>(g.grad_mask) + at * size);
    }
  }

  // Gradients of the queries of a head from the sums of the chunks.
  void add_chunks(int64_t sequence, int64_t h) const {
    const Head head = this->head(sequence, h);
    const int64_t count = chunks(head.keys), step = g.rows * p.width;
    if (count == 0) return;
    for (int64_t i = 0; i < head.queries; ++i) {
      T* first = static_cast<T*>(g.query_sums) + (head.row + i) * p.width;
      for (int64_t c = 1; c < count; ++c) {
        const T* next = first + c * step;
        for (int64_t k = 0; k < p.width; ++k) first[k] += next[k];
      }
      write_row(p.dtype, first, p.width, out_row(g.grad_query, sequence, h, query_start(sequence) + i));
    }
  }

 private:
  int64_t chunks(int64_t keys) const { return (keys + g.chunk - 1) / g.chunk; }
  int64_t mask_blocks(int d) const {
    const int64_t block = d == 2 ? kQueries : kKeys;
    return g.mask_size[d] == 1 ? 1 : (g.mask_size[d] + block - 1) / block;
  }
  int64_t query_start(int64_t sequence) const { return p.query_starts == nullptr ? 0 : p.query_starts[sequence]; }
  int64_t key_start(int64_t sequence) const { return p.key_starts == nullptr ? 0 : p.key_starts[sequence]; }
  Strips seen(const Head& head, const Block& b, int64_t j, int64_t count) const {
    return this->strips(b, at_least(j, this->first_seen(b)), at_most(j + count, this->end_seen(head, b)));
  }
  StridedMatrix<T> rows(const char* from, const Tensor4& tensor, int64_t width, int64_t first, int64_t count,
                        T* copy) const {
    return this->rows_of(from, tensor.stride, width, first, count, copy);
  }
  char* out_row(const Tensor4& tensor, int64_t a, int64_t b, int64_t c) const {
    return const_cast<char*>(this->at(tensor, this->size, a, b, c));
  }

  Memory take(Scratch& scratch, int64_t queries, int64_t keys) const {
    const int64_t width = round_up<int64_t>(p.width, kWidth), value_width = round_up<int64_t>(p.value_width, kWidth);
    const int64_t lanes = round_up<int64_t>(queries, kQueries);
    Memory m;
    m.q = scratch.take<T>(p.width * lanes);
    m.go = scratch.take<T>(p.value_width * lanes);
    m.dq = scratch.take<T>(width * lanes);
    m.q_rows = scratch.take<T>(width * queries);
    m.go_rows = scratch.take<T>(value_width * queries);
    m.lse = scratch.take<T>(lanes);
    m.delta = scratch.take<T>(lanes);
    // run_mask has a block of sums in their place.
    m.dk = scratch.take<T>(at_least(keys * width, g.grad_mask == nullptr ? 0 : kKeys * kQueries));
    m.dv = scratch.take<T>(keys * value_width);
    m.key = scratch.take<T>(kKeys * width);
    m.value = scratch.take<T>(kKeys * value_width);
    m.s = scratch.take<T>(kKeys * kQueries);
    m.ds = scratch.take<T>(kKeys * kQueries);
    m.staging = scratch.take<T>(kWidth * at_least(width, value_width));
    m.out = scratch.take<T>(value_width);
    m.extras = this->take_extras(scratch, true);
    return m;
  }

  // Rows of the right side of a product, in vectors of columns: where they stand, or copied.
  StridedMatrix<T> right_rows(const char* from, const Tensor4& tensor, int64_t width, int64_t count, T* copy) const {
    if (width % kWidth == 0) return rows(from, tensor, width, 0, count, copy);
    const int64_t row = round_up<int64_t>(width, kWidth);
    read_rows<T>(p.dtype, from, tensor.stride[2], tensor.stride[3], count, width, copy, row);
    return {copy, row, 1};
  }

  // The block of queries from `first` on, packed; `at` is its place in the memory.
  State state(const Head& head, int64_t sequence, int64_t h, int64_t first, const Memory& m, int64_t at) const {
    State out;
    static_cast<Block&>(out) = this->block(head, first);
    out.q = m.q + at * p.width;
    out.go = m.go + at * p.value_width;
    out.dq = m.dq + at * round_up<int64_t>(p.width, kWidth);
    out.lse = m.lse + at;
    out.delta = m.delta + at;
    this->pack_transposed_rows(head.query, p.query.stride, p.width, out, this->query_scale(), m.staging, out.q);
    const bool has_grad = g.grad_out.data != nullptr;
    const char* grad = has_grad ? this->at(g.grad_out, this->size, sequence, h, query_start(sequence)) : nullptr;
    if (has_grad) {
      this->pack_transposed_rows(grad, g.grad_out.stride, p.value_width, out, T(1), m.staging, out.go);
    } else {
      for (int64_t i = 0; i < p.value_width * out.lanes; ++i) out.go[i] = T(0);
    }
    const T* lse = static_cast<const T*>(p.lse) + head.row + first;
    const T* grad_lse = g.grad_lse == nullptr ? nullptr : static_cast<const T*>(g.grad_lse) + head.row + first;
    const T infinity = T(__builtin_inf());
    for (int64_t i = 0; i < out.lanes; ++i) {
      // A query that sees no key, and a lane without a query: weights of 2^-inf, and no gradient.
      const bool sees = i < out.count && lse[i] != -infinity;
      out.lse[i] = sees ? lse[i] * Base::kLog2E : infinity;
      out.delta[i] = T(0);
      if (!sees) continue;
      if (has_grad) {
        const int64_t row = first + i;
        read_rows<T>(p.dtype, grad + row * g.grad_out.stride[2] * this->size, 0, g.grad_out.stride[3], 1, p.value_width,
                     m.staging, 0);
        read_rows<T>(p.dtype, this->at(p.out, this->size, sequence, h, query_start(sequence) + row), 0, p.out.stride[3],
                     1, p.value_width, m.out, 0);
        out.delta[i] = dot(m.staging, m.out, p.value_width);
      }
      if (grad_lse != nullptr) out.delta[i] -= grad_lse[i];
    }
    return out;
  }

  // Of vectors with zeros behind the last element.
  static T dot(const T* a, const T* b, int64_t count) {
    F total(T(0));
    for (int64_t k = 0; k < count; k += kWidth) {
      F x, y;
      load(a + k, x);
      load(b + k, y);
      total = multiply_add(x, y, total);
    }
    return sum(total);
  }

  void run(int64_t sequence, int64_t kv, int64_t chunk, const Memory& m) const {
    const int64_t width = round_up<int64_t>(p.width, kWidth), value_width = round_up<int64_t>(p.value_width, kWidth);
    const int64_t keys = this->keys_of(sequence), first_key = chunk * g.chunk;
    const int64_t end_key = at_most(keys, first_key + g.chunk), group = p.heads / p.kv_heads;
    for (int64_t i = 0; i < (end_key - first_key) * width; ++i) m.dk[i] = T(0);
    for (int64_t i = 0; i < (end_key - first_key) * value_width; ++i) m.dv[i] = T(0);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      const Head head = this->head(sequence, h);
      double slope = 0;
      run_head(head, sequence, h, first_key, end_key, m, slope);
      if (g.slope_sums != nullptr) {
        g.slope_sums[(sequence * p.heads + h) * g.most_chunks + chunk] = slope;
      }
      if (g.grad_query.data == nullptr) continue;
      for (int64_t i = 0; i < head.queries; i += kQueries) write_query(head, sequence, h, chunk, i, m);
    }
    for (int64_t j = first_key; j < end_key; ++j) {
      T *dk = m.dk + (j - first_key) * width, *dv = m.dv + (j - first_key) * value_width;
      if (g.grad_key.data != nullptr) {
        for (int64_t k = 0; k < p.width; ++k) dk[k] *= T(p.scale);
        write_row(p.dtype, dk, p.width, out_row(g.grad_key, sequence, kv, key_start(sequence) + j));
      }
      if (g.grad_value.data != nullptr) {
        write_row(p.dtype, dv, p.value_width, out_row(g.grad_value, sequence, kv, key_start(sequence) + j));
      }
    }
  }

  // All queries of a head over the keys [first_key, end_key).
  void run_head(const Head& head, int64_t sequence, int64_t h, int64_t first_key, int64_t end_key, const Memory& m,
                double& slope) const {
    const int64_t width = round_up<int64_t>(p.width, kWidth), value_width = round_up<int64_t>(p.value_width, kWidth);
    for (int64_t i = 0; i < width * round_up<int64_t>(head.queries, kWidth); ++i) m.dq[i] = T(0);
    StridedMatrix<T> go_rows{m.go_rows, value_width, 1};
    if (g.grad_out.data != nullptr) {
      go_rows = right_rows(this->at(g.grad_out, this->size, sequence, h, query_start(sequence)), g.grad_out,
                           p.value_width, head.queries, m.go_rows);
    }
    const StridedMatrix<T> q_rows = right_rows(head.query, p.query, p.width, head.queries, m.q_rows);
    for (int64_t i = 0; i < head.queries; i += kQueries) state(head, sequence, h, i, m, i);

    for (int64_t j = first_key; j < end_key; j += kKeys) {
      const int64_t keys = at_most(kKeys, end_key - j);
      const StridedMatrix<T> key = rows(head.key, p.key, p.width, j, keys, m.key);
      const StridedMatrix<T> value = rows(head.value, p.value, p.value_width, j, keys, m.value);
      T *dk = m.dk + (j - first_key) * width, *dv = m.dv + (j - first_key) * value_width;
      for (int64_t i = 0; i < head.queries; i += kQueries) {
        State s;
        static_cast<Block&>(s) = this->block(head, i);
        s.q = m.q + i * p.width;
        s.go = m.go + i * p.value_width;
        s.dq = m.dq + i * width;
        s.lse = m.lse + i;
        s.delta = m.delta + i;
        s.q_rows = {q_rows.data + i * q_rows.row, q_rows.row, 1};
        s.go_rows = {go_rows.data + i * go_rows.row, go_rows.row, 1};
        pass(head, s, j, keys, key, value, dk, dv, m, slope);
      }
    }
  }

  void pass(const Head& head, const State& state, int64_t j, int64_t count, const StridedMatrix<T>& key,
            const StridedMatrix<T>& value, T* dk, T* dv, const Memory& m, double& slope) const {
    const Strips seen = this->seen(head, state, j, count);
    if (seen.count == 0) return;
    gradient_of_scores(head, state, seen, j, count, key, value, m);
    if (g.slope_sums != nullptr) {
      F total(T(0));
      this->for_scores(state, seen, j, m.ds, [&](F& ds, F distance, int64_t, int64_t) {
        total = multiply_add(ds, absolute(distance), total);
      });
      slope -= double(sum(total));
    }
    if (p.softcap > 0) {
      this->for_scores(state, seen, j, m.ds, [&](F& ds, F, int64_t at, int64_t) {
        F t;
        load(m.extras.tangent + at, t);
        ds = ds * (F(T(1)) - t * t);
      });
    }
    for (const Strip& strip : seen) {
      const int64_t row = strip.first - j, at = row * state.lanes + strip.begin * kWidth;
      const int64_t first = strip.begin * kWidth, lanes = at_most(strip.end * kWidth, state.count) - first;
      if (g.grad_value.data != nullptr && g.grad_out.data != nullptr) {
        add_rows(strip.count, {m.s + at, state.lanes, 1}, state.go_rows, first, lanes, p.value_width, dv, row);
      }
      if (g.grad_key.data != nullptr) {
        add_rows(strip.count, {m.ds + at, state.lanes, 1}, state.q_rows, first, lanes, p.width, dk, row);
      }
      if (g.grad_query.data != nullptr) {
        multiply_strided<A>(p.width, strip.end - strip.begin, {key.data + row * key.row, key.step, key.row}, m.ds + at,
                            state.lanes, strip.count, true, state.dq + first, state.lanes);
      }
    }
  }

  // Rows from `row` on of out, [keys][width], += left . rows [first, first + depth) of right.
  void add_rows(int64_t count, const StridedMatrix<T>& left, const StridedMatrix<T>& right, int64_t first,
                int64_t depth, int64_t width, T* out, int64_t row) const {
    const int64_t padded = round_up<int64_t>(width, kWidth);
    for (int64_t k = 0; k < padded; k += kVectors * kWidth) {
      const int vectors = int(at_most(kVectors, (padded - k) / kWidth));
      multiply_strided<A>(count, vectors, left, right.data + first * right.row + k, right.row, depth, true,
                          out + row * padded + k, padded);
    }
  }

  // The weights after dropout, P^T, in m.s, and the gradients of the scores, dS^T = P (dP - delta), in m.ds.
  __attribute__((noinline)) void gradient_of_scores(const Head& head, const State& state, const Strips& seen, int64_t j,
                                                    int64_t count, const StridedMatrix<T>& key,
                                                    const StridedMatrix<T>& value, const Memory& m) const {
    this->multiply_seen(state, seen, j, key, state.q, p.width, m.s);
    this->multiply_seen(state, seen, j, value, state.go, p.value_width, m.ds);
    this->adjust(head, state, seen, j, count, m.s, m.extras);
    if (this->drops()) {
      this->draw(head, state, j, count, m.extras);
      differentiate<true>(state, seen, j, m);
    } else {
      differentiate<false>(state, seen, j, m);
    }
  }
  template <bool kDrops>
  void differentiate(const State& state, const Strips& seen, int64_t j, const Memory& m) const {
    const F kept_weight{T(p.kept_weight)};
    for (const Strip& strip : seen) {
      for (int v = strip.begin; v < strip.end; ++v) {
        F lse, delta;
        load(state.lse + v * kWidth, lse);
        load(state.delta + v * kWidth, delta);
        int64_t at = (strip.first - j) * state.lanes + v * kWidth;
        for (int64_t k = 0; k < strip.count; ++k, at += state.lanes) {
          F score, dp;
          load(m.s + at, score);
          load(m.ds + at, dp);
          const F weight = power_of_2<T, U>(score - lse);
          if constexpr (kDrops) {
            F kept;
            load(m.extras.added + at, kept);
            kept = kept * kept_weight;
            store(m.s + at, weight * kept);
            store(m.ds + at, weight * (dp * kept - delta));
          } else {
            store(m.s + at, weight);
            store(m.ds + at, weight * (dp - delta));
          }
        }
      }
    }
  }

  // dQ of a block, turned to rows: the result, or the sums of this chunk.
  void write_query(const Head& head, int64_t sequence, int64_t h, int64_t chunk, int64_t first, const Memory& m) const {
    const Block b = this->block(head, first);
    const T* dq = m.dq + first * round_up<int64_t>(p.width, kWidth);
    const F scale(T(p.scale));
    for (int v = 0; v < b.vectors; ++v) {
      const int count = int(at_most(kWidth, b.count - v * kWidth));
      for (int64_t k = 0; k < p.width; k += kWidth) {
        F square[kWidth];
        FASTGEN_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          load(dq + (k + i) * b.lanes + v * kWidth, square[i]);
          square[i] = square[i] * scale;
        }
        transpose(square);
        const int columns = int(at_most(kWidth, p.width - k));
        for (int i = 0; i < count; ++i) {
          const int64_t row = first + v * kWidth + i;
          if (g.query_sums != nullptr) {
            put(static_cast<T*>(g.query_sums) + (chunk * g.rows + head.row + row) * p.width + k, square[i], columns);
            continue;
          }
          char* out = out_row(g.grad_query, sequence, h, query_start(sequence) + row);
          with_element<T>(
              p.dtype, [&](auto storage) { put(reinterpret_cast<decltype(storage)*>(out) + k, square[i], columns); });
        }
      }
    }
  }

  static void write_row(DType dtype, const T* from, int64_t count, void* out) {
    with_element<T>(dtype, [&](auto storage) {
      for (int64_t k = 0; k < count; k += kWidth) {
        const int columns = int(at_most(kWidth, count - k));
        put(static_cast<decltype(storage)*>(out) + k, fastgen::take<F>(from + k, columns), columns);
      }
    });
  }

  const AttentionBackwardParams& g;
};

AttentionBackwardSizes attention_backward_sizes(const AttentionBackwardParams& p) {
  AttentionBackwardSizes sizes{};
  with_work_type(p, [&](auto t) { sizes = AttentionBackward<decltype(t)>(p).sizes(); });
  return sizes;
}
void attention_backward(const AttentionBackwardParams& p, AttentionBackwardPhase phase, int64_t unit, void* scratch) {
  with_work_type(p, [&](auto t) {
    const AttentionBackward<decltype(t)> kernel(p);
    switch (phase) {
      case AttentionBackwardPhase::kMask: return kernel.run_mask(unit, scratch);
      case AttentionBackwardPhase::kKeys: return kernel.run(unit, scratch);
      case AttentionBackwardPhase::kQueries: return kernel.add_chunks(unit / p.heads, unit % p.heads);
    }
  });
}

}  // namespace
}  // namespace fastgen
