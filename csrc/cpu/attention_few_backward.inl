// The backward pass of attention where a few queries see a few keys: so little for a head that nothing is packed, and
// all products are of rows where they stand. All keys of a query are at hand: the mean of their dp, by weights p, is
// its dO . O.
#pragma once

#include "attention_few.inl"

namespace fastgen {
namespace {

template <class Storage>
class AttentionFewBackward : AttentionFew<Storage> {
  using Few = AttentionFew<Storage>;
  using Few::kRows;
  using Few::kWidth;
  using typename Few::F;
  using typename Few::Head;
  using typename Few::Row;
  using typename Few::T;
  using typename Few::U;

  static constexpr int64_t kKeys = 16;  // at most; whole vectors, and tiles of dot_tile

  // The rows of one key head.
  struct Rows {
    int count;
    Row row[kRows];
    const Storage *query[kRows], *grad[kRows];
    T weight[kRows][kKeys], ds[kRows][kKeys];  // scores, and then weights; dp, and then ds
  };

 public:
  explicit AttentionFewBackward(const AttentionBackwardParams& params) : Few(params), g(params) {}

  // By shape and strides alone, and where no gradient is asked for that needs more.
  static bool serves(const AttentionBackwardParams& p) {
    return Few::serves(p) && p.keys <= kKeys && p.softcap == 0 && p.grad_mask == nullptr && p.slope_sums == nullptr &&
           (p.grad_out.data == nullptr || p.grad_out.stride[3] == 1);
  }

  AttentionBackwardSizes sizes() const { return {p.batch * p.kv_heads, 0, 0, 0}; }

  void run(int64_t unit) const {
    const int64_t sequence = unit / p.kv_heads, kv = unit % p.kv_heads, group = p.heads / p.kv_heads;
    Rows rows;
    rows.count = 0;
    const Head first = this->head(sequence, kv * group);
    const auto* queries = reinterpret_cast<const Storage*>(first.query);
    int64_t query_place[kRows], grad_place[kRows];  // from those of the first row on
    for (int64_t h = 0; h < group; ++h) {
      for (int64_t i = 0; i < p.queries; ++i) {
        const int r = rows.count++;
        rows.row[r].head = h == 0 ? first : this->head(sequence, kv * group + h);
        rows.row[r].h = kv * group + h;
        rows.row[r].i = i;
        rows.row[r].scores = rows.weight[r];
        query_place[r] = h * p.query.stride[1] + i * p.query.stride[2];
        grad_place[r] = h * g.grad_out.stride[1] + i * g.grad_out.stride[2];
        rows.query[r] = queries + query_place[r];
      }
    }
    // What no query sees is not read.
    const int64_t begin = this->seen_begin(), count = this->seen_end() - begin;
    const Storage *keys = reinterpret_cast<const Storage*>(first.key) + begin * p.key.stride[2],
                  *values = reinterpret_cast<const Storage*>(first.value) + begin * p.value.stride[2];
    const Term<Storage> scores[1] = {{{keys, p.key.stride[2], nullptr}, {queries, 1, query_place}, p.width}};
    dot_tile(scores, 0, rows.count, 0, count, rows.weight[0], kKeys);
    const bool has_grad = g.grad_out.data != nullptr;
    if (has_grad) {
      const auto* grad = reinterpret_cast<const Storage*>(this->at(g.grad_out, this->size, sequence, kv * group, 0));
      for (int r = 0; r < rows.count; ++r) rows.grad[r] = grad + grad_place[r];
      const Term<Storage> dp[1] = {{{values, p.value.stride[2], nullptr}, {grad, 1, grad_place}, p.value_width}};
      dot_tile(dp, 0, rows.count, 0, count, rows.ds[0], kKeys);
    }
    for (int r = 0; r < rows.count; ++r) differentiate(rows, r, begin, count, has_grad);

    const auto of_key = [&](const T(&from)[kRows][kKeys], const Storage* const(&with)[kRows], int64_t j, int64_t k,
                            int columns, T factor) {
      F total(T(0));
      for (int r = 0; r < rows.count; ++r) {
        total = multiply_add(F(from[r][j]), take<F>(with[r] + k, columns), total);
      }
      return total * F(factor);
    };
    for (int64_t j = 0; j < p.keys; ++j) {
      const int64_t at = j - begin;
      const bool seen = at >= 0 && at < count;
      write(g.grad_key, sequence, kv, j, p.width, [&](int64_t k, int columns) {
        return seen ? of_key(rows.ds, rows.query, at, k, columns, T(p.scale)) : F(T(0));
      });
      write(g.grad_value, sequence, kv, j, p.value_width, [&](int64_t k, int columns) {
        return seen && has_grad ? of_key(rows.weight, rows.grad, at, k, columns, T(1)) : F(T(0));
      });
    }
    for (int r = 0; r < rows.count; ++r) {
      write(g.grad_query, sequence, rows.row[r].h, rows.row[r].i, p.width, [&](int64_t k, int columns) {
        F total(T(0));
        for (int64_t j = 0; j < count; ++j) {
          total = multiply_add(F(rows.ds[r][j]), take<F>(keys + j * p.key.stride[2] + k, columns), total);
        }
        return total * F(T(p.scale));
      });
    }
  }

 private:
  // Products to weights and gradients of the scores, p (dp - dO . O + d lse), of one row and the keys [begin, begin +
  // count).
  void differentiate(Rows& rows, int r, int64_t begin, int64_t count, bool has_grad) const {
    const Row& row = rows.row[r];
    this->adjust(row, begin, count);
    const int64_t number = row.head.row + row.i;
    const T infinity = T(__builtin_inf()), lse = static_cast<const T*>(p.lse)[number];
    // A query that sees no key: weights of 2^-inf, and no gradient.
    const F minus_log2e(-Few::kLog2E), above(lse == -infinity ? infinity : lse);
    F total(T(0)), of_weights(T(0));
    T* weights = rows.weight[r];
    T* ds = rows.ds[r];
    for (int64_t j = 0; j < count; j += kWidth) {
      const int left = int(at_most(kWidth, count - j));
      F weight, dp(T(0));
      load(weights + j, weight);
      if (has_grad) load_first(ds + j, left, dp);
      weight = power_of_2<T, U>(smaller(F(T(0)), multiply_add(above, minus_log2e, weight)));  // 1 at most
      total = multiply_add(weight, dp, total);
      of_weights = of_weights + weight;
      store(weights + j, weight);
      store(ds + j, dp);
    }
    // A mean: what the rounding of lse does to all weights alike must not become a difference from dp.
    const T all = sum(of_weights);
    T delta = all > T(0) ? sum(total) / all : T(0);
    if (g.grad_lse != nullptr && lse != -infinity) delta -= static_cast<const T*>(g.grad_lse)[number];
    for (int64_t j = 0; j < count; j += kWidth) {
      F weight, dp;
      load(weights + j, weight);
      load(ds + j, dp);
      store(ds + j, weight * (dp - F(delta)));
    }
  }

  // A row of a gradient, where it is asked for: body(k, columns) gives the columns [k, k + columns).
  template <class Body>
  void write(const Tensor4& to, int64_t a, int64_t b, int64_t c, int64_t width, const Body& body) const {
    if (to.data == nullptr) return;
    auto* out = reinterpret_cast<Storage*>(const_cast<char*>(this->at(to, this->size, a, b, c)));
    for (int64_t k = 0; k < width; k += kWidth) {
      const int columns = int(at_most(kWidth, width - k));
      put(out + k, body(k, columns), columns);
    }
  }

  using Few::p;
  const AttentionBackwardParams& g;
};

}  // namespace
}  // namespace fastgen
