// Reparameterised sampling and its backward, written once over Isa (after random.inl).
//
// Noise is made a tile at a time in L1, by the fill that also serves fastgen.random: the bits cannot
// differ. The algebra, per element, with s = exp(logvar / 2):
//   z = mu + s eps                    kl = sum over the row of (mu^2 + (exp(logvar) - 1 - logvar)) / 2
//   grad_mu = gz + gk mu              grad_logvar = (gz s eps + gk (exp(logvar) - 1)) / 2
#include "../common/params.h"
#include "lanes.inl"

namespace fastgen {
namespace {

// A stretch of one row of an operand, read a vector at a time; lanes past the end read as zero.
template <class Storage>
struct Row {
  using F = typename Work<typename WorkType<Storage>::T>::F;
  static constexpr int kWidth = kLanes<typename WorkType<Storage>::T>;

  const Storage* p;
  int64_t stride;
  F same;  // where stride is 0

  FASTGEN_MEMBER Row(const Operand& operand, const Shape& shape, int64_t row, int64_t column)
      : p(static_cast<const Storage*>(operand.data)), stride(operand.inner_stride) {
    if (p == nullptr) return;
    p += row_offset(shape, operand.outer_stride, row) + column * stride;
    if (stride == 0) same = F(widen(*p));
  }

  FASTGEN_MEMBER F get(int64_t i, int count) const {
    if (stride == 1) return take<F>(p + i, count);
    if (stride == 0) return same;
    F out;
    Storage lanes[kWidth] = {};
    for (int k = 0; k < count; ++k) lanes[k] = p[(i + k) * stride];
    load(lanes, out);
    return out;
  }
};

// Sums are kept in 64 bytes of lanes whatever the vector width, and added up in one order: the same bits
// on every instruction set.
template <class T>
struct RowSum {
  using F = typename Work<T>::F;
  static constexpr int kTotal = 64 / int(sizeof(T)), kParts = kTotal / kLanes<T>;
  F part[kParts];

  FASTGEN_MEMBER RowSum() {
    for (int i = 0; i < kParts; ++i) part[i] = F(T(0));
  }
  FASTGEN_MEMBER void add(int64_t i, F value) {
    F& to = part[kParts == 1 ? 0 : (i / kLanes<T>) % kParts];
    to = to + value;
  }
  FASTGEN_MEMBER T total() const {
    F left[kParts];
    for (int i = 0; i < kParts; ++i) left[i] = part[i];
    for (int width = kParts / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) left[i] = left[i] + left[i + width];
    }
    return sum(left[0]);
  }
};

// Asks for the memory of `kCount` operands while the noise for them is made: without it the processor would
// first compute, then wait. Sparse and constant rows are left to themselves.
template <class Storage, int kCount>
struct AskAhead {
  static constexpr int64_t kBytes = kStep<typename WorkType<Storage>::T> * int64_t(sizeof(Storage));
  const char* p[kCount];

  template <class... Operands>
  FASTGEN_MEMBER AskAhead(const Shape& shape, int64_t row, int64_t column, const Operands&... operands)
      : p{start(shape, row, column, operands)...} {}

  FASTGEN_MEMBER static const char* start(const Shape& shape, int64_t row, int64_t column, const Operand& operand) {
    if (operand.data == nullptr || operand.inner_stride != 1) return nullptr;
    const Storage* data = static_cast<const Storage*>(operand.data);
    return reinterpret_cast<const char*>(data + row_offset(shape, operand.outer_stride, row) + column);
  }

  FASTGEN_MEMBER void operator()(int64_t step) const {
    FASTGEN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (p[i] == nullptr) continue;
      for (int64_t b = 0; b < kBytes; b += 64) __builtin_prefetch(p[i] + step * kBytes + b);
    }
  }
};

// Calls body(row, column, length, piece, noise) for the pieces [begin, end); noise points at the normals of
// the piece, or is null where the caller brings its own.
template <class T, class Body>
FASTGEN_FN void for_each_piece(const Shape& shape, uint64_t seed, uint64_t offset, bool draw, int64_t begin,
                               int64_t end, const Body& body) {
  const PhiloxKey key(seed);
  const int64_t per_row = pieces_per_row(shape);
  // Short rows share a tile; the slack lets the last vector of a row be read whole.
  const int64_t rows_per_tile = per_row == 1 ? kPiece / shape.inner : 1;
  alignas(64) T noise[kPiece + kLanes<T>];
  for (int64_t piece = begin; piece < end;) {
    const int64_t row = piece / per_row, column = piece % per_row * kPiece;
    const int64_t length = shape.inner - column < kPiece ? shape.inner - column : kPiece;
    const int64_t count = end - piece < rows_per_tile ? end - piece : rows_per_tile;
    if (draw) {
      fill<T>(noise, offset + uint64_t(row * shape.inner + column), count * length, key, StandardNormal<T>(),
              body.ahead(row, column));
    }
    for (int64_t k = 0; k < count; ++k) body(row + k, column, length, piece + k, draw ? noise + k * length : nullptr);
    piece += count;
  }
}

template <class F, class Storage>
FASTGEN_FN F noise_at(const typename WorkType<Storage>::T* noise, const Row<Storage>& eps, int64_t i, int count) {
  if (noise == nullptr) return eps.get(i, count);
  F out;
  load(noise + i, out);
  return out;
}

template <class Storage, bool kWithKl>
struct Forward {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  const ReparameterizeParams& p;

  FASTGEN_MEMBER AskAhead<Storage, 2> ahead(int64_t row, int64_t column) const {
    return {p.shape, row, column, p.mu, p.logvar};
  }

  FASTGEN_MEMBER void operator()(int64_t row, int64_t column, int64_t length, int64_t piece, const T* noise) const {
    const Row<Storage> mu(p.mu, p.shape, row, column), logvar(p.logvar, p.shape, row, column),
        eps(p.eps, p.shape, row, column);
    Storage* z = static_cast<Storage*>(p.z) + row * p.shape.inner + column;
    RowSum<T> sum;
    for (int64_t i = 0; i < length; i += kLanes<T>) {
      const int count = length - i < kLanes<T> ? int(length - i) : kLanes<T>;
      const F m = mu.get(i, count), v = logvar.get(i, count);
      const Exponentials<F> e = exponentials<T, U>(v);
      put(z + i, m + e.of_half * noise_at<F>(noise, eps, i, count), count);
      if (kWithKl) {
        F term = m * m + e.minus_1_minus;
        // A broadcast operand does not read as zero past the end.
        if (count < kLanes<T>) term = keep_first(term, count);
        sum.add(i, term);
      }
    }
    if (!kWithKl) return;
    const T half = T(0.5) * sum.total();
    if (p.kl_pieces != nullptr) {
      p.kl_pieces[piece] = double(half);
    } else {
      narrow(half, static_cast<Storage*>(p.kl) + row);
    }
  }
};

template <class Storage, bool kWithZ, bool kWithKl>
struct Backward {
  using T = typename WorkType<Storage>::T;
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  const ReparameterizeBackwardParams& p;

  FASTGEN_MEMBER AskAhead<Storage, 3> ahead(int64_t row, int64_t column) const {
    return {p.shape, row, column, p.grad_z, p.mu, p.logvar};
  }

  FASTGEN_MEMBER void operator()(int64_t row, int64_t column, int64_t length, int64_t, const T* noise) const {
    const Row<Storage> grad_z(p.grad_z, p.shape, row, column), grad_kl(p.grad_kl, p.shape, row, column),
        mu(p.mu, p.shape, row, column), logvar(p.logvar, p.shape, row, column), eps(p.eps, p.shape, row, column);
    const int64_t start = row * p.shape.inner + column;
    Storage* grad_mu = p.grad_mu == nullptr ? nullptr : static_cast<Storage*>(p.grad_mu) + start;
    Storage* grad_logvar = static_cast<Storage*>(p.grad_logvar) + start;
    for (int64_t i = 0; i < length; i += kLanes<T>) {
      const int count = length - i < kLanes<T> ? int(length - i) : kLanes<T>;
      const F v = logvar.get(i, count);
      const Exponentials<F> e = exponentials<T, U>(v);
      F to_mu(T(0)), to_logvar(T(0));
      if (kWithZ) {
        const F gz = grad_z.get(i, count);
        to_mu = gz;
        to_logvar = gz * (e.of_half * noise_at<F>(noise, eps, i, count));
      }
      if (kWithKl) {
        const F gk = grad_kl.get(i, count);
        const F kl_mu = gk * mu.get(i, count), kl_logvar = gk * e.minus_1;
        to_mu = kWithZ ? to_mu + kl_mu : kl_mu;
        to_logvar = kWithZ ? to_logvar + kl_logvar : kl_logvar;
      }
      put(grad_logvar + i, F(T(0.5)) * to_logvar, count);
      if (grad_mu != nullptr) put(grad_mu + i, to_mu, count);
    }
  }
};

template <class Storage>
void reparameterize_as(const ReparameterizeParams& p, int64_t begin, int64_t end) {
  using T = typename WorkType<Storage>::T;
  const bool draw = p.eps.data == nullptr;
  if (p.kl != nullptr) {
    for_each_piece<T>(p.shape, p.seed, p.offset, draw, begin, end, Forward<Storage, true>{p});
  } else {
    for_each_piece<T>(p.shape, p.seed, p.offset, draw, begin, end, Forward<Storage, false>{p});
  }
}

template <class Storage>
void reparameterize_backward_as(const ReparameterizeBackwardParams& p, int64_t begin, int64_t end) {
  using T = typename WorkType<Storage>::T;
  const bool draw = p.eps.data == nullptr;
  if (p.grad_z.data == nullptr) {
    for_each_piece<T>(p.shape, p.seed, p.offset, false, begin, end, Backward<Storage, false, true>{p});
  } else if (p.grad_kl.data == nullptr) {
    for_each_piece<T>(p.shape, p.seed, p.offset, draw, begin, end, Backward<Storage, true, false>{p});
  } else {
    for_each_piece<T>(p.shape, p.seed, p.offset, draw, begin, end, Backward<Storage, true, true>{p});
  }
}

template <class Storage>
void add_pieces_as(const ReparameterizeParams& p, int64_t begin, int64_t end) {
  const int64_t per_row = pieces_per_row(p.shape);
  for (int64_t row = begin; row < end; ++row) {
    double total = 0;
    for (int64_t i = 0; i < per_row; ++i) total += p.kl_pieces[row * per_row + i];
    narrow(typename WorkType<Storage>::T(total), static_cast<Storage*>(p.kl) + row);
  }
}

#define FASTGEN_BY_DTYPE(function)                                   \
  switch (p.dtype) {                                                 \
    case DType::kFloat64: return function<double>(p, begin, end);    \
    case DType::kBFloat16: return function<BFloat16>(p, begin, end); \
    case DType::kFloat16: return function<Float16>(p, begin, end);   \
    default: return function<float>(p, begin, end);                  \
  }

void reparameterize(const ReparameterizeParams& p, int64_t begin, int64_t end) { FASTGEN_BY_DTYPE(reparameterize_as) }
void reparameterize_add_pieces(const ReparameterizeParams& p, int64_t begin, int64_t end) {
  FASTGEN_BY_DTYPE(add_pieces_as)
}
void reparameterize_backward(const ReparameterizeBackwardParams& p, int64_t begin, int64_t end) {
  FASTGEN_BY_DTYPE(reparameterize_backward_as)
}
#undef FASTGEN_BY_DTYPE

}  // namespace
}  // namespace fastgen
