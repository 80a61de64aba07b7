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

template <class A_>
class AttentionBackward : Attention<A_> {
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

  // Keys and values at work.
  struct Keys {
    int64_t first, count;
    StridedMatrix<Element> key, value, key_columns;
  };

  // A block of queries. Panels are [width][lanes], rows are those of the head from the block on.
  struct State : Block {
    Element *q, *go;  // panels
    T* dq;            // panel
    T *lse, *delta;   // [lanes]; the latter dO . O - d lse
    StridedMatrix<Element> q_rows, go_rows;
  };

  // The blocks of one head, and the gradients of a chunk of keys.
  struct Memory {
    Element *q, *go, *q_rows, *go_rows;
    T *dq, *lse, *delta;
    T *dk, *dv;  // [keys][width], of a chunk or of a block
    Element *key, *value, *key_columns, *staging;
    T *s, *ds;                   // [keys][lanes]
    Element *weights, *ds_rows;  // the same as left sides
    T* rows[2];                  // of dO and O
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

  void run(AttentionBackwardPhase phase, int64_t unit, void* memory) const {
    switch (phase) {
      case AttentionBackwardPhase::kMask: return run_mask(unit, memory);
      case AttentionBackwardPhase::kKeys: return run_keys(unit, memory);
      case AttentionBackwardPhase::kQueries: return add_chunks(unit / p.heads, unit % p.heads);
    }
  }

 private:
  void run_keys(int64_t unit, void* memory) const {
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
          State state = placed(head, i * kQueries, m, 0);
          pack(head, b, h, state, m);
          range(g.mask_size[3], bj, (p.keys + kKeys - 1) / kKeys, [&](int64_t jb) {
            const int64_t j = jb * kKeys, keys = at_most(kKeys, p.keys - j);
            const Strips seen = this->seen(head, state, j, keys);
            if (seen.count == 0) return;
            gradient_of_scores(head, state, seen, this->keys(head, j, keys, m), m, false);
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
      write_row(p.mask_dtype, row, g.mask_size[3] == 1 ? 1 : keys, T(1), static_cast<char*>(g.grad_mask) + at * size);
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
      write_row(p.dtype, first, p.width, T(1), out_row(g.grad_query, sequence, h, query_start(sequence) + i));
    }
  }

  int64_t chunks(int64_t keys) const { return (keys + g.chunk - 1) / g.chunk; }
  int64_t mask_blocks(int d) const {
    const int64_t block = d == 2 ? kQueries : kKeys;
    return g.mask_size[d] == 1 ? 1 : (g.mask_size[d] + block - 1) / block;
  }
  int64_t query_start(int64_t sequence) const { return p.query_starts == nullptr ? 0 : p.query_starts[sequence]; }
  int64_t key_start(int64_t sequence) const { return p.key_starts == nullptr ? 0 : p.key_starts[sequence]; }
  Keys keys(const Head& head, int64_t j, int64_t count, const Memory& m) const {
    Keys out;
    out.first = j;
    out.count = count;
    out.key = this->rows_of(head.key, p.key.stride, p.width, j, count, m.key);
    out.value = this->rows_of(head.value, p.value.stride, p.value_width, j, count, m.value);
    out.key_columns = this->columns_of(out.key, p.width, count, m.key_columns);
    return out;
  }
  char* out_row(const Tensor4& tensor, int64_t a, int64_t b, int64_t c) const {
    return const_cast<char*>(this->at(tensor, this->size, a, b, c));
  }

  Memory take(Scratch& scratch, int64_t queries, int64_t keys) const {
    const int64_t width = round_up<int64_t>(p.width, kWidth), value_width = round_up<int64_t>(p.value_width, kWidth);
    const int64_t lanes = round_up<int64_t>(queries, kWidth);
    const int64_t block_keys = this->block_keys(keys), block = block_keys * this->block_lanes(queries);
    Memory m;
    const int64_t pairs = kDepth == 1 ? 0 : 1;  // what only pairs need
    m.q = scratch.take<Element>(width * lanes);
    m.go = scratch.take<Element>(value_width * lanes);
    m.q_rows = scratch.take<Element>(width * lanes);
    m.go_rows = scratch.take<Element>(value_width * lanes);
    m.dq = scratch.take<T>(width * lanes);
    m.lse = scratch.take<T>(lanes);
    m.delta = scratch.take<T>(lanes);
    // Of several heads they are summed over the chunk, of one written block by block. run_mask has a block of sums
    // here.
    const int64_t rows = group() == 1 ? block_keys : keys;
    m.dk = scratch.take<T>(at_least(rows * width, g.grad_mask == nullptr ? 0 : kKeys * kQueries));
    m.dv = scratch.take<T>(rows * value_width);
    m.key = scratch.take<Element>(block_keys * width);
    m.value = scratch.take<Element>(block_keys * value_width);
    m.key_columns = scratch.take<Element>(pairs * block_keys * width);
    m.staging = scratch.take<Element>(kWidth * at_least(width, value_width));
    m.s = scratch.take<T>(block);
    m.ds = scratch.take<T>(block);
    m.weights = kDepth == 1 ? reinterpret_cast<Element*>(m.s) : scratch.take<Element>(block);
    m.ds_rows = kDepth == 1 ? reinterpret_cast<Element*>(m.ds) : scratch.take<Element>(block);
    for (T*& row : m.rows) row = scratch.take<T>(value_width);
    m.extras = this->take_extras(scratch, true);
    return m;
  }

  // Rows of a head as the right side of a product whose depth they are, in vectors of columns: where they stand, or
  // copied.
  StridedMatrix<Element> right_rows(const char* from, const Tensor4& tensor, int64_t width, int64_t count,
                                    Element* copy) const {
    const int64_t row = round_up<int64_t>(width, kWidth);
    if constexpr (kDepth == 1) {
      if (width == row) return this->rows_of(from, tensor.stride, width, 0, count, copy);
      read_rows<Element>(p.dtype, from, tensor.stride[2], tensor.stride[3], count, width, copy, row);
    } else {
      A::pair_rows(reinterpret_cast<const Element*>(from), tensor.stride[2], tensor.stride[3], count, width, copy, row);
    }
    return {copy, row, 1};
  }

  // The block of queries from `first` on, at place `at` of the memory.
  State placed(const Head& head, int64_t first, const Memory& m, int64_t at) const {
    State out;
    static_cast<Block&>(out) = this->block(head, first);
    out.q = m.q + at * round_up<int64_t>(p.width, kWidth);
    out.go = m.go + at * round_up<int64_t>(p.value_width, kWidth);
    out.dq = m.dq + at * round_up<int64_t>(p.width, kWidth);
    out.lse = m.lse + at;
    out.delta = m.delta + at;
    return out;
  }

  void pack(const Head& head, int64_t sequence, int64_t h, const State& state, const Memory& m) const {
    this->pack_rows(head.query, p.query.stride, p.width, state, m.staging, state.q);
    const bool has_grad = g.grad_out.data != nullptr;
    const char* grad = has_grad ? this->at(g.grad_out, this->size, sequence, h, query_start(sequence)) : nullptr;
    if (has_grad) {
      this->pack_rows(grad, g.grad_out.stride, p.value_width, state, m.staging, state.go);
    } else {
      const int64_t depth = round_up<int64_t>(p.value_width, kDepth);
      for (int64_t i = 0; i < depth * state.lanes; ++i) state.go[i] = {};
    }
    const T* lse = static_cast<const T*>(p.lse) + head.row + state.first;
    const T* grad_lse = g.grad_lse == nullptr ? nullptr : static_cast<const T*>(g.grad_lse) + head.row + state.first;
    const T infinity = T(__builtin_inf());
    for (int64_t i = 0; i < state.lanes; ++i) {
      // A query that sees no key, and a lane without a query: weights of 2^-inf, and no gradient.
      const bool sees = i < state.count && lse[i] != -infinity;
      state.lse[i] = sees ? lse[i] : infinity;
      state.delta[i] = T(0);
      if (!sees) continue;
      if (has_grad) {
        const int64_t row = state.first + i;
        read_rows<T>(p.dtype, grad + row * g.grad_out.stride[2] * this->size, 0, g.grad_out.stride[3], 1, p.value_width,
                     m.rows[0], 0);
        read_rows<T>(p.dtype, this->at(p.out, this->size, sequence, h, query_start(sequence) + row), 0, p.out.stride[3],
                     1, p.value_width, m.rows[1], 0);
        state.delta[i] = dot(m.rows[0], m.rows[1], p.value_width);
      }
      if (grad_lse != nullptr) state.delta[i] -= grad_lse[i];
    }
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
    const int64_t first_key = chunk * g.chunk, end_key = at_most(this->keys_of(sequence), first_key + g.chunk);
    for (int64_t h = kv * group(); h < (kv + 1) * group(); ++h) {
      const Head head = this->head(sequence, h);
      double slope = 0;
      run_head(head, sequence, h, first_key, end_key, m, slope);
      if (g.slope_sums != nullptr) {
        g.slope_sums[(sequence * p.heads + h) * g.most_chunks + chunk] = slope;
      }
      if (g.grad_query.data == nullptr) continue;
      for (int64_t i = 0; i < head.queries; i += kQueries) write_query(head, sequence, h, chunk, i, m);
    }
  }

  // Query heads that read a key head.
  int64_t group() const { return p.heads / at_least(p.kv_heads, 1); }

  // All queries of a head over the keys [first_key, end_key).
  void run_head(const Head& head, int64_t sequence, int64_t h, int64_t first_key, int64_t end_key, const Memory& m,
                double& slope) const {
    const int64_t width = round_up<int64_t>(p.width, kWidth), value_width = round_up<int64_t>(p.value_width, kWidth);
    for (int64_t i = 0; i < width * round_up<int64_t>(head.queries, kWidth); ++i) m.dq[i] = T(0);
    // From the first block of queries that sees one of the keys to the end of the last.
    int64_t begin = 0, end = head.queries;
    const auto sees = [&](int64_t i) {
      const Block b = this->block(head, i);
      return this->first_seen(b) < end_key && first_key < this->end_seen(head, b);
    };
    while (begin < end && !sees(begin)) begin += kQueries;
    while (begin < end && !sees((end - 1) / kQueries * kQueries)) end = (end - 1) / kQueries * kQueries;
    if (begin >= end) begin = end = 0;

    StridedMatrix<Element> go_rows{m.go_rows, value_width, 1};
    if (g.grad_out.data != nullptr) {
      go_rows = right_rows(this->at(g.grad_out, this->size, sequence, h, query_start(sequence) + begin), g.grad_out,
                           p.value_width, end - begin, m.go_rows);
    }
    const StridedMatrix<Element> q_rows =
        right_rows(head.query + begin * p.query.stride[2] * this->size, p.query, p.width, end - begin, m.q_rows);
    for (int64_t i = begin; i < end; i += kQueries) pack(head, sequence, h, placed(head, i, m, i), m);

    const int64_t of_group = h % group();
    for (int64_t j = first_key; j < end_key; j += kKeys) {
      const Keys keys = this->keys(head, j, at_most(kKeys, end_key - j), m);
      const int64_t row = group() == 1 ? 0 : j - first_key;
      T *dk = m.dk + row * width, *dv = m.dv + row * value_width;
      for (int64_t i = 0; i < keys.count * width && of_group == 0; ++i) dk[i] = T(0);
      for (int64_t i = 0; i < keys.count * value_width && of_group == 0; ++i) dv[i] = T(0);
      for (int64_t i = begin; i < end; i += kQueries) {
        State state = placed(head, i, m, i);
        state.q_rows = {q_rows.data + (i - begin) * q_rows.row, q_rows.row, 1};
        state.go_rows = {go_rows.data + (i - begin) * go_rows.row, go_rows.row, 1};
        pass(head, state, keys, dk, dv, m, slope);
      }
      if (of_group + 1 == group()) write_keys(sequence, h / group(), keys, dk, dv);
    }
  }

  // The gradients of a block of keys and values.
  void write_keys(int64_t sequence, int64_t kv, const Keys& keys, const T* dk, const T* dv) const {
    const int64_t width = round_up<int64_t>(p.width, kWidth), value_width = round_up<int64_t>(p.value_width, kWidth);
    for (int64_t j = 0; j < keys.count; ++j) {
      const int64_t row = key_start(sequence) + keys.first + j;
      if (g.grad_key.data != nullptr) {
        write_row(p.dtype, dk + j * width, p.width, T(p.scale), out_row(g.grad_key, sequence, kv, row));
      }
      if (g.grad_value.data != nullptr) {
        write_row(p.dtype, dv + j * value_width, p.value_width, T(1), out_row(g.grad_value, sequence, kv, row));
      }
    }
  }

  void pass(const Head& head, const State& state, const Keys& keys, T* dk, T* dv, const Memory& m,
            double& slope) const {
    const int64_t j = keys.first;
    const Strips seen = this->seen(head, state, j, keys.count);
    if (seen.count == 0) return;
    const bool changes = g.slope_sums != nullptr || p.softcap > 0;  // before it enters products
    gradient_of_scores(head, state, seen, keys, m, !changes);
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
    if (kDepth > 1 && changes) {
      for_steps(state, seen, j, m, true, [](int) { return [](int64_t, F&, F&) {}; });
    }
    for (const Strip& strip : seen) {
      const int64_t row = strip.first - j, at = row * state.lanes + strip.begin * kWidth;
      const int64_t first = strip.begin * kWidth, lanes = at_most(strip.end * kWidth, state.count) - first;
      if (g.grad_value.data != nullptr && g.grad_out.data != nullptr) {
        add_rows(strip.count, {m.weights + at, state.lanes, 1}, state.go_rows, first, lanes, p.value_width, dv, row);
      }
      if (g.grad_key.data != nullptr) {
        add_rows(strip.count, {m.ds_rows + at, state.lanes, 1}, state.q_rows, first, lanes, p.width, dk, row);
      }
      if (g.grad_query.data != nullptr) this->add_seen(state, strip, j, keys.key_columns, p.width, m.ds, state.dq);
    }
  }

  // Rows from `row` on of out, [keys][width], += left . rows [first, first + depth) of right.
  void add_rows(int64_t count, const StridedMatrix<Element>& left, const StridedMatrix<Element>& right, int64_t first,
                int64_t depth, int64_t width, T* out, int64_t row) const {
    const int64_t padded = round_up<int64_t>(width, kWidth);
    for (int64_t k = 0; k < padded; k += kVectors * kWidth) {
      const int vectors = int(at_most(kVectors, (padded - k) / kWidth));
      multiply_strided<A>(count, vectors, left, right.data + first * right.row + k * kDepth, right.row * kDepth, depth,
                          T(1), true, out + row * padded + k, padded);
    }
  }

  // The weights after dropout, P^T, in m.s, and the gradients of the scores, dS^T = P (dP - delta), in m.ds; or both as
  // the sides of products: in m.weights and m.ds_rows, and dS^T as a right side in place of m.ds.
  __attribute__((noinline)) void gradient_of_scores(const Head& head, const State& state, const Strips& seen,
                                                    const Keys& keys, const Memory& m, bool sides) const {
    const int64_t j = keys.first;
    this->multiply_seen(state, seen, j, keys.key, state.q, p.width, this->query_scale(), m.s);
    this->multiply_seen(state, seen, j, keys.value, state.go, p.value_width, T(1), m.ds);
    this->adjust(head, state, seen, j, keys.count, m.s, m.extras);
    if (this->drops()) {
      this->draw(head, state, j, keys.count, m.extras);
      differentiate<true>(state, seen, j, m, sides);
    } else {
      differentiate<false>(state, seen, j, m, sides);
    }
  }
  template <bool kDrops>
  void differentiate(const State& state, const Strips& seen, int64_t j, const Memory& m, bool sides) const {
    const F kept_weight{T(p.kept_weight)}, minus_log2e(-Base::kLog2E);
    for_steps(state, seen, j, m, sides, [&](int v) {
      F lse, delta;
      load(state.lse + v * kWidth, lse);
      load(state.delta + v * kWidth, delta);
      return [=, &m](int64_t at, F& weight, F& ds) {
        // No weight is above 1; but lse does not tell apart the scores of a row under huge masks. A NaN passes.
        weight = power_of_2<T, U>(smaller(F(T(0)), multiply_add(lse, minus_log2e, weight)));
        if constexpr (kDrops) {
          F kept;
          load(m.extras.added + at, kept);
          kept = kept * kept_weight;
          ds = weight * (ds * kept - delta);
          weight = weight * kept;
        } else {
          ds = weight * (ds - delta);
        }
      };
    });
  }

  // Calls body_of(vector)(place, a vector of m.s, the one of m.ds) for all that the strips see, and puts both back: as
  // they are, or as the sides of products.
  template <class BodyOf>
  FASTGEN_MEMBER void for_steps(const State& state, const Strips& seen, int64_t j, const Memory& m, bool sides,
                                const BodyOf& body_of) const {
    T *const s = m.s, *const ds = m.ds;
    Element *const weights = m.weights, *const ds_rows = m.ds_rows, *const ds_steps = reinterpret_cast<Element*>(ds);
    const int64_t lanes = state.lanes;
    for (const Strip& strip : seen) {
      const int64_t begin = (strip.first - j) * lanes, whole = strip.count / kDepth * kDepth * lanes;
      for (int v = strip.begin; v < strip.end; ++v) {
        const auto body = body_of(v);
        const auto step = [&](int64_t row, auto rows) {
          const int64_t at = row + v * kWidth;
          F weight[kDepth], grad[kDepth];
          FASTGEN_UNROLL
          for (int i = 0; i < kDepth; ++i) {
            if (i >= rows.value) {  // half a pair
              weight[i] = grad[i] = F(T(0));
              continue;
            }
            load(s + at + i * lanes, weight[i]);
            load(ds + at + i * lanes, grad[i]);
            body(at + i * lanes, weight[i], grad[i]);
          }
          if (sides) {
            A::put_rows(weight, weights + at, lanes);
            A::put_rows(grad, ds_rows + at, lanes);
            if constexpr (kDepth > 1) A::put_step(grad, ds_steps + row + v * kWidth * kDepth);
          } else {
            FASTGEN_UNROLL
            for (int i = 0; i < kDepth; ++i) {
              store(s + at + i * lanes, weight[i]);
              store(ds + at + i * lanes, grad[i]);
            }
          }
        };
        for (int64_t row = begin; row < begin + whole; row += kDepth * lanes) step(row, Rows<kDepth>());
        if (strip.count % kDepth != 0) step(begin + whole, Rows<1>());
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

  static void write_row(DType dtype, const T* from, int64_t count, T factor, void* out) {
    with_element<T>(dtype, [&](auto storage) {
      for (int64_t k = 0; k < count; k += kWidth) {
        const int columns = int(at_most(kWidth, count - k));
        put(static_cast<decltype(storage)*>(out) + k, fastgen::take<F>(from + k, columns) * F(factor), columns);
      }
    });
  }

  const AttentionBackwardParams& g;
};

}  // namespace
}  // namespace fastgen
