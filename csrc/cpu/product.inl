// Matrix products, written once over Isa (after a vec_*.h).
//
// A tile of rows by vectors of the result stays in registers while the depth runs: one element of the left side is
// broadcast against a row of the right side, which is packed in panels
//   [depth][kVectors * lanes]
// so that a tile reads it as one stream. The left side is read where it stands, by row pointers. An element of the
// result is one chain of multiply-adds in ascending depth, or a cascade of such chains, whatever the tile it falls in:
// its bits depend neither on the split of the work nor on its neighbours.
#pragma once

#include "lanes.inl"

namespace fastgen {
namespace {

// A square of vectors on its diagonal: each round zips row i with row i + lanes / 2.
template <class F, int kWidth>
FASTGEN_FN void transpose(F (&x)[kWidth]) {
  F y[kWidth];
  FASTGEN_UNROLL
  for (int round = 1; round < kWidth; round *= 2) {
    FASTGEN_UNROLL
    for (int i = 0; i < kWidth / 2; ++i) interleave(x[i], x[i + kWidth / 2], y[2 * i], y[2 * i + 1]);
    FASTGEN_UNROLL
    for (int i = 0; i < kWidth; ++i) x[i] = y[i];
  }
}

// One vector of columns of a panel from rows of a matrix that run along the depth (the transposed right side):
// out[k * step + lane] = rows[lane][k]. A null row is zero.
template <class F, class Storage, class T, int kWidth>
__attribute__((noinline)) void pack_transposed(const Storage* const (&rows)[kWidth], int64_t depth, int64_t step,
                                               T* out) {
  F square[kWidth];
  for (int64_t k = 0; k < depth; k += kWidth) {
    const int count = depth - k < kWidth ? int(depth - k) : kWidth;
    FASTGEN_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      square[i] = rows[i] == nullptr ? F(T(0)) : take<F>(rows[i] + k, count);
    }
    transpose(square);
    for (int i = 0; i < count; ++i) store(out + (k + i) * step, square[i]);
  }
}

// Arithmetic in T: what the two sides are stored as, and one step of the depth.
template <class T_>
struct Multiply {
  using T = T_;
  using F = typename Work<T>::F;
  using Left = T;
  using Right = T;
  static constexpr int kDepth = 1;  // elements of the depth that one step takes

  static FASTGEN_MEMBER F spread(const Left* left) { return F(*left); }
  static FASTGEN_MEMBER void load_right(const Right* right, F& out) { load(right, out); }
  static FASTGEN_MEMBER F step(F left, F right, F sum) { return multiply_add(left, right, sum); }

  // What the kDepth rows of one step are packed into, either side.
  static FASTGEN_MEMBER void put_step(const F (&rows)[kDepth], T* out) { store(out, rows[0]); }
  // The same kDepth rows as left sides, `stride` elements from one to the next.
  static FASTGEN_MEMBER void put_rows(const F (&rows)[kDepth], T* out, int64_t) { store(out, rows[0]); }
  // The same of `count` columns of rows in storage; a null row is zero.
  template <class Storage>
  static FASTGEN_MEMBER void copy_step(const Storage* const (&rows)[kDepth], int count, T* out) {
    store(out, take<F>(rows[0], count));
  }
  // Packs a vector of columns as pack_transposed does, `step` columns apart from one depth to the next.
  template <class Storage>
  static FASTGEN_MEMBER void pack(const Storage* const (&rows)[kLanes<T>], int64_t depth, int64_t step, Right* out) {
    pack_transposed<F>(rows, depth, step, out);
  }
  // A row of the left side, to whole steps of the depth.
  template <class Storage>
  static FASTGEN_MEMBER void copy_row(const Storage* from, int64_t count, Left* out) {
    for (int64_t k = 0; k < count; k += kLanes<T>) {
      const int lanes = count - k < kLanes<T> ? int(count - k) : kLanes<T>;
      put(out + k, take<F>(from + k, lanes), lanes);
    }
  }
};

template <class T>
constexpr int64_t round_up(T count, T unit) {
  return (count + unit - 1) / unit * unit;
}
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of a tile: as many as the registers hold sums for.
template <int kVectors>
constexpr int kTileRows = Isa::kSums / kVectors;

// The left side of a tile: rows by pointer, or interleaved, [depth][rows].
template <class A, int kRows>
struct LeftRows {
  const typename A::Left* row[kRows];
  FASTGEN_MEMBER explicit LeftRows(const typename A::Left* const* rows) {
    for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  }
  FASTGEN_MEMBER typename A::F at(int r, int64_t k) const { return A::spread(row[r] + k); }
};
template <class A, int kRows>
struct LeftColumns {
  const typename A::Left* data;
  FASTGEN_MEMBER explicit LeftColumns(const typename A::Left* packed) : data(packed) {}
  FASTGEN_MEMBER typename A::F at(int r, int64_t k) const { return A::spread(data + k * kRows + r * A::kDepth); }
};

// sum += left . right. Steps of the right side are `right_step` elements apart.
template <class A, int kRows, int kVectors, class LeftSide>
FASTGEN_FN void multiply_sums(const LeftSide& left, const typename A::Right* right, int64_t right_step, int64_t depth,
                              typename A::F (&sum)[kRows][kVectors]) {
  using F = typename A::F;
  constexpr int kWidth = kLanes<typename A::T>;
  for (int64_t k = 0; k < depth; k += A::kDepth) {
    F b[kVectors];
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) A::load_right(right + v * kWidth * A::kDepth, b[v]);
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const F a = left.at(r, k);
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = A::step(a, b[v], sum[r][v]);
    }
    right += right_step;
  }
}

// out = start + left . right for a panel; start null: zero, and with `add` what stands in out comes last. Rows of start
// and out are `*_stride` elements apart.
template <class A, int kRows, int kVectors, class LeftSide>
FASTGEN_FN void multiply_tile(const LeftSide& left, const typename A::Right* right, int64_t depth,
                              const typename A::T* start, int64_t start_stride, typename A::T* out, int64_t out_stride,
                              bool add) {
  using F = typename A::F;
  constexpr int kWidth = kLanes<typename A::T>;
  F sum[kRows][kVectors];
  FASTGEN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (start == nullptr) {
        sum[r][v] = F(typename A::T(0));
      } else {
        load(start + r * start_stride + v * kWidth, sum[r][v]);
      }
    }
  }
  multiply_sums<A>(left, right, kVectors * kWidth * A::kDepth, depth, sum);
  if (add) {
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        F before;
        load(out + r * out_stride + v * kWidth, before);
        sum[r][v] = before + sum[r][v];
      }
    }
  }
  FASTGEN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kWidth, sum[r][v]);
  }
}

// The same for 1 <= rows <= kTileRows, known at run time.
template <class A, int kVectors, int kRows = kTileRows<kVectors>>
__attribute__((noinline)) void multiply_rows(int rows, const typename A::Left* const* left,
                                             const typename A::Right* right, int64_t depth, const typename A::T* start,
                                             int64_t start_stride, typename A::T* out, int64_t out_stride, bool add) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_rows<A, kVectors, kRows - 1>(rows, left, right, depth, start, start_stride, out, out_stride, add);
    }
  }
  multiply_tile<A, kRows, kVectors>(LeftRows<A, kRows>(left), right, depth, start, start_stride, out, out_stride, add);
}

// Rows of the next tile where `left` are left: tiles of a batch are as equal as they can be.
template <int kVectors>
FASTGEN_FN int next_tile(int64_t left) {
  constexpr int64_t kMost = kTileRows<kVectors>;
  const int64_t tiles = (left + kMost - 1) / kMost;
  return int((left + tiles - 1) / tiles);
}

constexpr int64_t kDepthBlock = 128;  // steps of a panel that stay in L1 while the left side passes by
constexpr int64_t kLongDepth = 1024;  // steps from which on a cascade is one
constexpr int64_t kGroupRows = 64;    // rows that pass by together, where their sums have to wait on the stack

// The same for any number of rows: the panel goes through L1 once, and sums wait in `out`. With `cascade` each block of
// a long depth has a sum of its own, and these are added up in order: as gates are four times the states, gradients of
// states are longer sums than states, and the error of a single chain grows with the root of its length.
template <class A, int kVectors>
__attribute__((noinline)) void multiply_panel(int64_t rows, const typename A::Left* const* left,
                                              const typename A::Right* panel, int64_t depth, const typename A::T* start,
                                              int64_t start_stride, typename A::T* out, int64_t out_stride,
                                              bool cascade = false) {
  constexpr int64_t kColumns = kVectors * kLanes<typename A::T>;
  cascade = cascade && depth >= kLongDepth * A::kDepth;
  const int64_t block = rows <= kTileRows<kVectors> && depth > 0 && !cascade ? depth : kDepthBlock * A::kDepth;
  for (int64_t k = 0; k == 0 || k < depth; k += block) {  // without depth, out = start
    for (int64_t n = 0; n < rows;) {
      const int count = next_tile<kVectors>(rows - n);
      const typename A::Left* from[kTileRows<kVectors>];
      for (int r = 0; r < count; ++r) from[r] = left[n + r] + k;
      typename A::T* to = out + n * out_stride;
      multiply_rows<A, kVectors>(count, from, panel + k * kColumns, depth - k < block ? depth - k : block,
                                 k > 0              ? cascade ? nullptr : to
                                 : start == nullptr ? nullptr
                                                    : start + n * start_stride,
                                 k > 0 ? out_stride : start_stride, to, out_stride, cascade && k > 0);
      n += count;
    }
  }
}

// A matrix as it stands: element (r, k) is data[r * row + k * step].
template <class T>
struct StridedMatrix {
  const T* data;
  int64_t row, step;
};

template <class A, int kRows>
struct LeftStrided {
  const typename A::Left* row[kRows];
  int64_t step;
  FASTGEN_MEMBER explicit LeftStrided(const StridedMatrix<typename A::Left>& left) : step(left.step) {
    for (int r = 0; r < kRows; ++r) row[r] = left.data + r * left.row;
  }
  FASTGEN_MEMBER typename A::F at(int r, int64_t k) const { return A::spread(row[r] + k * step); }
};

template <int kVectors>
constexpr int kStridedRows = kTileRows<kVectors> < 12 ? kTileRows<kVectors> : 12;

template <class A, int kVectors, int kRows = kStridedRows<kVectors>>
__attribute__((noinline)) void multiply_strided_rows(int rows, const StridedMatrix<typename A::Left>& left,
                                                     const typename A::Right* right, int64_t right_step, int64_t depth,
                                                     typename A::T factor, bool add, typename A::T* out,
                                                     int64_t out_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_strided_rows<A, kVectors, kRows - 1>(rows, left, right, right_step, depth, factor, add, out,
                                                           out_stride);
    }
  }
  using F = typename A::F;
  constexpr int kWidth = kLanes<typename A::T>;
  F sum[kRows][kVectors];
  FASTGEN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = F(typename A::T(0));
  }
  multiply_sums<A>(LeftStrided<A, kRows>(left), right, right_step, depth, sum);
  FASTGEN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      typename A::T* to = out + r * out_stride + v * kWidth;
      F before(typename A::T(0));
      if (add) load(to, before);
      store(to, multiply_add(sum[r][v], F(factor), before));
    }
  }
}

// out = factor left . right, or out += factor left . right with a sum of its own, nothing packed: for a right side of
// `kVectors` vectors of columns that stays in L1.
template <class A, int kVectors>
FASTGEN_FN void multiply_strided_panel(int64_t rows, StridedMatrix<typename A::Left> left,
                                       const typename A::Right* right, int64_t right_step, int64_t depth,
                                       typename A::T factor, bool add, typename A::T* out, int64_t out_stride) {
  constexpr int kMost = kStridedRows<kVectors>;
  while (rows > 0) {
    const int64_t tiles = (rows + kMost - 1) / kMost;
    const int count = int((rows + tiles - 1) / tiles);
    multiply_strided_rows<A, kVectors>(count, left, right, right_step, depth, factor, add, out, out_stride);
    left.data += count * left.row;
    out += count * out_stride;
    rows -= count;
  }
}
template <class A>
FASTGEN_FN void multiply_strided(int64_t rows, int vectors, const StridedMatrix<typename A::Left>& left,
                                 const typename A::Right* right, int64_t right_step, int64_t depth,
                                 typename A::T factor, bool add, typename A::T* out, int64_t out_stride) {
  switch (vectors) {
    case 1: return multiply_strided_panel<A, 1>(rows, left, right, right_step, depth, factor, add, out, out_stride);
    case 2: return multiply_strided_panel<A, 2>(rows, left, right, right_step, depth, factor, add, out, out_stride);
    case 3: return multiply_strided_panel<A, 3>(rows, left, right, right_step, depth, factor, add, out, out_stride);
    case 4: return multiply_strided_panel<A, 4>(rows, left, right, right_step, depth, factor, add, out, out_stride);
  }
}

// A right side as it stands, its rows along the columns of the result, by number of the row and in vectors of columns:
// a matrix,
template <class Storage>
struct MatrixRows {
  using T = typename WorkType<Storage>::T;
  const void* data;
  int64_t columns;
  FASTGEN_MEMBER typename Work<T>::F operator()(int64_t k, int64_t j, int count) const {
    return take<typename Work<T>::F>(static_cast<const Storage*>(data) + k * columns + j, count);
  }
};
// or rows by pointer, each times a row of masks where there are masks.
template <class Storage>
struct PointedRows {
  using T = typename WorkType<Storage>::T;
  const void* const* rows;
  const void* const* masks;
  FASTGEN_MEMBER typename Work<T>::F operator()(int64_t k, int64_t j, int count) const {
    using F = typename Work<T>::F;
    const F value = take<F>(static_cast<const Storage*>(rows[k]) + j, count);
    return masks == nullptr ? value : value * take<F>(static_cast<const Storage*>(masks[k]) + j, count);
  }
};

// The panel of kVectors * lanes columns from `first` on, of which `columns` exist, of rows [begin, begin + depth).
template <class A, int kVectors, class Rows>
__attribute__((noinline)) void pack_panel(const Rows& rows, int64_t begin, int64_t depth, int64_t first,
                                          int64_t columns, typename A::Right* out) {
  using F = typename A::F;
  constexpr int kWidth = kLanes<typename A::T>;
  const auto pack_steps = [&](int64_t k, int64_t end, const auto& element) {
    for (; k < end; k += A::kDepth) {
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        F x[A::kDepth];
        FASTGEN_UNROLL
        for (int i = 0; i < A::kDepth; ++i) x[i] = element(k + i, first + v * kWidth);
        A::put_step(x, out);
        out += kWidth * A::kDepth;
      }
    }
    return k;
  };
  int64_t k = 0;
  if (columns - first >= kVectors * kWidth) {
    const auto whole = [&](int64_t at, int64_t column) { return rows(begin + at, column, kWidth); };
    k = pack_steps(0, depth / A::kDepth * A::kDepth, whole);
  }
  pack_steps(k, depth, [&](int64_t at, int64_t column) {
    const int64_t left = columns - column;
    return left > 0 && at < depth ? rows(begin + at, column, left < kWidth ? int(left) : kWidth) : F(typename A::T(0));
  });
}

constexpr int kFlatVectors = 4;        // of a panel whose columns have no structure
constexpr int64_t kColumnBlock = 512;  // columns of right sides whose panels and sums are held together
constexpr int64_t kRowGroup = 96;      // rows of the left side that are packed at once
constexpr int64_t kPanelBytes = 1 << 21;

// out[m][n] = sum over k of left[k][m] * right(k, n): products with the left side transposed, as the gradients of
// weights are. The sum is made in blocks of the depth, added up in order: as with any cascade, its error grows with
// the root of the number of blocks only.
//
// The panels of the right side are packed as deep as kPanelBytes hold them, so that the result is read and written
// once for that depth; between its blocks the sums of a group of rows wait in L2.
//
// left rows are `left_stride` elements apart. Several right sides share the work of packing the left one.
template <class A>
struct TransposedProduct {
  using T = typename A::T;
  using F = typename A::F;
  using Left = typename A::Left;
  using Right = typename A::Right;
  static constexpr int kWidth = kLanes<T>, kColumns = kFlatVectors * kWidth, kRows = kTileRows<kFlatVectors>;
  static constexpr int64_t kGroupTiles = kRowGroup / kRows, kGroup = kGroupTiles * kRows;
  static constexpr int64_t kBlock = kDepthBlock * A::kDepth;  // of one chain of multiply-adds
  static constexpr int64_t kDeep = kPanelBytes / (kColumnBlock * int64_t(sizeof(Right)));
  // A packed tile of the left side, and room for the rest of the vector that its last row is written as.
  static constexpr int64_t kLeftTile = kBlock * kRows + kWidth * A::kDepth;
  static_assert(kDeep % kBlock == 0 && kWidth >= kRows, "");

  static int64_t scratch_bytes(int64_t depth) {
    return int64_t(sizeof(Right)) * panel_depth(depth) * kColumnBlock + int64_t(sizeof(T)) * kGroup * kColumnBlock +
           int64_t(sizeof(Left)) * kLeftTile * kGroupTiles;
  }

  template <class Rows>
  struct Target {
    Rows right;
    int64_t columns;
    T* out;          // [rows, columns]
    int64_t stride;  // of its rows
  };

  template <class Storage, class Rows>
  static __attribute__((noinline)) void run(const Storage* left, int64_t left_stride, int64_t depth, int64_t rows,
                                            const Target<Rows>* targets, int count, void* scratch) {
    if (rows <= 0) return;
    Right* panels = static_cast<Right*>(scratch);
    T* sums = reinterpret_cast<T*>(panels + panel_depth(depth) * kColumnBlock);
    Left* packed = reinterpret_cast<Left*>(sums + kGroup * kColumnBlock);
    // The panels of all targets in a row, as many at a time as there is room for.
    struct {
      const Target<Rows>* target;
      int64_t first;  // column
    } panel[kColumnBlock / kColumns];
    int found = 0;
    const auto flush = [&] {
      for (int64_t first = 0; first < depth && found > 0; first += kDeep) {
        const int64_t deep = at_most(depth - first, kDeep), stride = round_up<int64_t>(deep, A::kDepth) * kColumns;
        for (int j = 0; j < found; ++j) {
          pack_panel<A, kFlatVectors>(panel[j].target->right, first, deep, panel[j].first, panel[j].target->columns,
                                      panels + j * stride);
        }
        for (int64_t m = 0; m < rows; m += kGroup) {
          const int64_t group = at_most(rows - m, kGroup);
          for (int64_t k = 0; k < deep; k += kBlock) {
            const int64_t block = at_most(deep - k, kBlock);
            pack_left(left + (first + k) * left_stride + m, left_stride, block, group, rows - m, packed);
            for (int j = 0; j < found; ++j) {
              for (int64_t i = 0; i * kRows < group; ++i) {
                multiply_packed(packed + i * kLeftTile, panels + j * stride + k * kColumns, block, k > 0,
                                sums + (j * kGroupTiles + i) * kRows * kColumns);
              }
            }
          }
          for (int j = 0; j < found; ++j) {
            const Target<Rows>& target = *panel[j].target;
            put_sums(sums + j * kGroup * kColumns, group, target.columns - panel[j].first, first > 0,
                     target.out + m * target.stride + panel[j].first, target.stride);
          }
        }
      }
      found = 0;
    };
    for (int t = 0; t < count; ++t) {
      for (int64_t n = 0; n < targets[t].columns; n += kColumns) {
        panel[found++] = {targets + t, n};
        if (found == kColumnBlock / kColumns) flush();
      }
    }
    flush();
  }

 private:
  static constexpr int64_t kAhead = 16;  // rows of the left side that are asked for in advance

  static int64_t panel_depth(int64_t depth) { return round_up<int64_t>(at_most(depth, kDeep), A::kDepth); }

  // Tiles of [depth][kRows], kLeftTile apart, of the first `rows` of those that are there. A whole vector is written
  // for each row of a tile: what it overwrites past that row is written after it.
  template <class Storage>
  static __attribute__((noinline)) void pack_left(const Storage* left, int64_t stride, int64_t depth, int64_t rows,
                                                  int64_t there, Left* out) {
    for (int64_t k = 0; k < depth; k += A::kDepth) {
      for (int q = 0; q < A::kDepth; ++q) {
        const char* ahead = reinterpret_cast<const char*>(left + (k + q + kAhead) * stride);
        for (int64_t b = 0; b < rows * int64_t(sizeof(Storage)); b += 64) __builtin_prefetch(ahead + b);
      }
      for (int64_t i = 0; i < rows; i += kRows) {
        const Storage* from[A::kDepth];
        for (int q = 0; q < A::kDepth; ++q) from[q] = k + q < depth ? left + (k + q) * stride + i : nullptr;
        A::copy_step(from, there - i < kWidth ? int(there - i) : kWidth, out + i / kRows * kLeftTile + k * kRows);
      }
    }
  }
  // sums = left . right, or sums += left . right.
  static __attribute__((noinline)) void multiply_packed(const Left* left, const Right* right, int64_t depth,
                                                        bool continued, T* sums) {
    F sum[kRows][kFlatVectors];
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTGEN_UNROLL
      for (int v = 0; v < kFlatVectors; ++v) sum[r][v] = F(T(0));
    }
    multiply_sums<A>(LeftColumns<A, kRows>(left), right, kColumns * A::kDepth, depth, sum);
    FASTGEN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTGEN_UNROLL
      for (int v = 0; v < kFlatVectors; ++v) {
        T* to = sums + r * kColumns + v * kWidth;
        F before(T(0));
        if (continued) load(to, before);
        store(to, before + sum[r][v]);
      }
    }
  }
  static __attribute__((noinline)) void put_sums(const T* sums, int64_t rows, int64_t columns, bool add, T* out,
                                                 int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < kColumns && j < columns; j += kWidth) {
        const int count = columns - j < kWidth ? int(columns - j) : kWidth;
        F value;
        load(sums + r * kColumns + j, value);
        put(out + r * stride + j, add ? take<F>(out + r * stride + j, count) + value : value, count);
      }
    }
  }
};

}  // namespace
}  // namespace fastgen
