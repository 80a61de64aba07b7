// The gradients of attention on a CUDA device, from what the forward pass left: the log-sum-exp of each row, and out.
//
//   P = exp(S - lse),  dP = dO V^T,  dS = P (dP - delta),  delta = dO . O - d lse
//   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
//
// One kernel in two directions. A block owns some rows of one side, keys or queries, and walks, a tile at a time, over
// the rows of the other side that it has to do with; a side is a pair of matrices, (K, V) or (Q, dO):
//
//   it owns keys:     S^T = K Q^T,  dP^T = V dO^T,  dK += dS^T Q,  dV += P^T dO
//   it owns queries:  S = Q K^T,    dP = dO V^T,    dQ += dS K
//
// So the gradients of what a block owns are its own sums, made in one order: nothing is added between blocks, and with
// grouped heads a block of keys walks over the queries of all heads that read them. The price is that S and dP are made
// twice, seven products for five. What else is deterministic, dQ of each tile of 128 keys as fp32 sums in memory, would
// write and read 8 bytes for every 4 x 128 operations that are made again: no less time (docs/gpu.md).
#pragma once

#include "attention_gradients.h"

namespace fastgen {
namespace {

// ---------------------------------------------------------------------------------------------------
// Two ways to compute: which cells of a block of scores a thread has, and the products. Cells are those of the rows
// that the block owns and of a strip of kStrip columns, rows of the walked tile. The threads of a group have the same
// kGroupRows rows.

// On tensor cores, a warp a group: a product leaves its cells in the registers that are the left side of the next one.
template <class T_, int kWidth_, bool kOwnsKeys_>
struct TensorCores {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kOwnsKeys = kOwnsKeys_;
  // Of width 128, dK and dV of 16 rows fill 128 registers of each thread.
  static constexpr int kTiles = kWidth == 64 ? 2 : 1, kGroupRows = 16 * kTiles;
  static constexpr int kRows = 128, kColumns = kWidth == 64 ? 64 : 32, kStrip = kWidth == 64 ? 16 : 32;
  static constexpr int kThreads = kRows / kGroupRows * 32, kBlocks = kWidth == 64 ? 2 : 1;
  static constexpr int kPerTile = kStrip / 2, kCells = kTiles * kPerTile;
  static constexpr int kExchange = 0;
  using Sums = float[kTiles][kWidth / 8][4];

  static __device__ int group_row() { return int(threadIdx.x) / 32 * kGroupRows; }
  static __device__ int row(int cell) {
    return group_row() + cell / kPerTile * 16 + cell / 2 % 2 * 8 + int(threadIdx.x) % 32 / 4;
  }
  static __device__ int column(int cell) { return cell % kPerTile / 4 * 8 + int(threadIdx.x) % 4 * 2 + cell % 2; }

  // An owned tile as the left side of products: dQ leaves the registers to keep it there, dK and dV do not.
  struct Own {
    const T* tile;
    uint32_t kept[kOwnsKeys ? 1 : kWidth / 16][kTiles][4];

    __device__ __forceinline__ void load(const T* from) {
      tile = from;
      if constexpr (!kOwnsKeys) {
        FASTGEN_UNROLL
        for (int k = 0; k < kWidth / 16; ++k) read(k, kept[k]);
      }
    }
    __device__ __forceinline__ void read(int k, uint32_t (&a)[kTiles][4]) const {
      FASTGEN_UNROLL
      for (int m = 0; m < kTiles; ++m) load_left<T, kWidth>(a[m], tile, group_row() + 16 * m, 16 * k);
    }
  };

  // cells = own walked^T, of the rows from `first` on.
  static __device__ __forceinline__ void multiply(const Own& own, const T* walked, int first, float (&cells)[kCells]) {
    float d[kTiles][kStrip / 8][4] = {};
    FASTGEN_UNROLL
    for (int k = 0; k < kWidth; k += 16) {
      uint32_t read[kTiles][4];
      if constexpr (kOwnsKeys) own.read(k / 16, read);
      const auto& a = kOwnsKeys ? read : own.kept[kOwnsKeys ? 0 : k / 16];
      FASTGEN_UNROLL
      for (int n = 0; n < kStrip / 8; n += 2) {
        uint32_t b[2][2];
        load_right_of_rows<T, kWidth>(b, walked, first + 8 * n, k);
        FASTGEN_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          multiply_add<T>(d[m][n], a[m], b[0]);
          multiply_add<T>(d[m][n + 1], a[m], b[1]);
        }
      }
    }
    FASTGEN_UNROLL
    for (int i = 0; i < kCells; ++i) cells[i] = d[i / kPerTile][i % kPerTile / 4][i % 4];
  }

  // sums += cells walked, the same rows. Cells become halves, as the products of the forward pass do.
  static __device__ __forceinline__ void accumulate(const float (&cells)[kCells], const T* walked, int first,
                                                    Sums& sums, float*) {
    FASTGEN_UNROLL
    for (int k = 0; k < kStrip; k += 16) {
      uint32_t a[kTiles][4];
      FASTGEN_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        FASTGEN_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int cell = m * kPerTile + k / 2 + 2 * i;
          a[m][i] = pack<T>(cells[cell], cells[cell + 1]);
        }
      }
      FASTGEN_UNROLL
      for (int n = 0; n < kWidth / 8; n += 2) {
        uint32_t b[2][2];
        load_right_of_columns<T, kWidth>(b, walked, first + k, 8 * n);
        FASTGEN_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          multiply_add<T>(sums[m][n], a[m], b[0]);
          multiply_add<T>(sums[m][n + 1], a[m], b[1]);
        }
      }
    }
  }

  // Two neighbours, at an even place.
  static __device__ void store_pair(T* to, float a, float b) { *reinterpret_cast<uint32_t*>(to) = pack<T>(a, b); }

  // Calls body(row, column, sum, its right neighbour) for all sums of this thread.
  template <class Body>
  static __device__ __forceinline__ void for_pairs(const Sums& sums, const Body& body) {
    FASTGEN_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      FASTGEN_UNROLL
      for (int i = 0; i < 2; ++i) {
        FASTGEN_UNROLL
        for (int n = 0; n < kWidth / 8; ++n) {
          body(row(m * kPerTile + 2 * i), 8 * n + int(threadIdx.x) % 4 * 2, sums[m][n][2 * i], sums[m][n][2 * i + 1]);
        }
      }
    }
  }
};

// float32, by fused multiply-adds: a group is the block, and its cells pass through shared memory.
template <int kWidth_, bool kOwnsKeys_>
struct Scalars {
  using T = float;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kOwnsKeys = kOwnsKeys_;
  static constexpr int kRows = 64, kGroupRows = kRows, kColumns = 32, kStrip = kColumns;
  static constexpr int kThreads = 256, kBlocks = 1, kCells = kRows * kStrip / kThreads;
  static constexpr int kExchangeRow = kStrip + 1, kExchange = kRows * kExchangeRow;  // floats in shared memory
  using Sums = float[4][kWidth / 64][4];

  static __device__ int group_row() { return 0; }
  static __device__ int row(int cell) { return int(threadIdx.x) / 16 + cell / 2 * 16; }
  static __device__ int column(int cell) { return int(threadIdx.x) % 16 + cell % 2 * 16; }

  struct Own {
    const T* tile;
    __device__ void load(const T* from) { tile = from; }
  };

  static __device__ float4 four(const float* tile, int row, int column) {
    return *reinterpret_cast<const float4*>(tile + Tile<T, kWidth>::at(row, column));
  }

  static __device__ __forceinline__ void multiply(const Own& own, const T* walked, int first, float (&cells)[kCells]) {
    FASTGEN_UNROLL
    for (float& cell : cells) cell = 0.0f;
    for (int k = 0; k < kWidth; k += 4) {
      float4 left[4], right[2];
      FASTGEN_UNROLL
      for (int i = 0; i < 4; ++i) left[i] = four(own.tile, row(2 * i), k);
      FASTGEN_UNROLL
      for (int j = 0; j < 2; ++j) right[j] = four(walked, first + column(j), k);
      FASTGEN_UNROLL
      for (int c = 0; c < kCells; ++c) {
        const float4 x = left[c / 2], y = right[c % 2];
        cells[c] = x.w * y.w + (x.z * y.z + (x.y * y.y + (x.x * y.x + cells[c])));
      }
    }
  }

  static __device__ __forceinline__ void accumulate(const float (&cells)[kCells], const T* walked, int first,
                                                    Sums& sums, float* exchange) {
    FASTGEN_UNROLL
    for (int c = 0; c < kCells; ++c) exchange[row(c) * kExchangeRow + column(c)] = cells[c];
    block_barrier();
    for (int k = 0; k < kStrip; ++k) {
      FASTGEN_UNROLL
      for (int n = 0; n < kWidth / 64; ++n) {
        const float4 right = four(walked, first + k, 64 * n + int(threadIdx.x) % 16 * 4);
        FASTGEN_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float left = exchange[row(2 * i) * kExchangeRow + k];
          sums[i][n][0] += left * right.x;
          sums[i][n][1] += left * right.y;
          sums[i][n][2] += left * right.z;
          sums[i][n][3] += left * right.w;
        }
      }
    }
  }

  static __device__ void store_pair(T* to, float a, float b) { *reinterpret_cast<float2*>(to) = {a, b}; }

  template <class Body>
  static __device__ __forceinline__ void for_pairs(const Sums& sums, const Body& body) {
    FASTGEN_UNROLL
    for (int i = 0; i < 4; ++i) {
      FASTGEN_UNROLL
      for (int n = 0; n < kWidth / 64; ++n) {
        const int column = 64 * n + int(threadIdx.x) % 16 * 4;
        body(row(2 * i), column, sums[i][n][0], sums[i][n][1]);
        body(row(2 * i), column + 2, sums[i][n][2], sums[i][n][3]);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------

// Shared memory of a block.
template <class A>
struct GradientMemory {
  using T = typename A::T;
  // Queries of a tile of scores; their bits of dropout are words of 64 keys. A word spans several tiles where the
  // walked ones are keys.
  static constexpr int kQueries = A::kOwnsKeys ? A::kColumns : A::kRows;
  static constexpr int kWords = A::kOwnsKeys ? A::kRows / 64 : 1;
  static constexpr int kTileRow = Tile<T, A::kWidth>::kRow;

  T* own_tiles;     // (K, V) or (Q, dO)
  T* walked_tiles;  // the other two, by stage
  float2* terms;    // of the queries of a tile; by stage where they are walked
  float* exchange;  // of accumulate
  uint64_t* kept;   // [kQueries][kWords]
  double* partial;  // of each warp
  size_t bytes = 0;

  FASTGEN_MEMBER GradientMemory(unsigned char* memory, bool drops) {
    own_tiles = take<T>(memory, 2 * A::kRows * kTileRow);
    walked_tiles = take<T>(memory, 4 * A::kColumns * kTileRow);
    terms = take<float2>(memory, A::kOwnsKeys ? 2 * A::kColumns : A::kRows);
    exchange = take<float>(memory, 2 * A::kExchange);
    kept = take<uint64_t>(memory, drops ? kQueries * kWords : 0);
    partial = take<double>(memory, A::kThreads / 32);
  }

  FASTGEN_MEMBER T* own(int i) const { return own_tiles + i * (A::kRows * kTileRow); }
  FASTGEN_MEMBER T* walked(int step, int i) const {
    return walked_tiles + (step % 2 * 2 + i) * (A::kColumns * kTileRow);
  }

 private:
  template <class U>
  FASTGEN_MEMBER U* take(unsigned char* memory, size_t count) {
    U* out = reinterpret_cast<U*>(memory + bytes);
    bytes += (count * sizeof(U) + 15) / 16 * 16;
    return out;
  }
};

// kExtras: whether a call can have a softcap, a mask, slopes or dropout.
template <class A, bool kExtras>
class GradientBlock {
  using T = typename A::T;
  using Sums = typename A::Sums;
  static constexpr int kWidth = A::kWidth;
  static constexpr bool kOwnsKeys = A::kOwnsKeys;
  static constexpr int kRows = A::kRows, kColumns = A::kColumns, kCells = A::kCells;
  using Memory = GradientMemory<A>;

 public:
  __device__ explicit GradientBlock(const AttentionGradients& gradients)
      : g(gradients), c(gradients.c), m(dynamic_shared(), kExtras && drops(gradients.c)) {}

  __device__ __forceinline__ void run() {
    const int heads = kOwnsKeys ? c.kv_heads : c.heads;
    int64_t unit = blockIdx.x;
    s = sequence_of(c, unit, int64_t(heads) * tiles(kOwnsKeys ? c.keys : c.queries));
    const int count = kOwnsKeys ? s.keys : s.queries, all = tiles(count);
    const int own_head = int(unit / all), tile = int(unit % all);
    // Under a causal mask the first keys and the last queries have most to do: they begin.
    first = (kOwnsKeys ? tile : all - 1 - tile) * kRows;
    own_count = smaller_int(kRows, count - first);
    const int group = c.heads / c.kv_heads;
    kv_head = kOwnsKeys ? own_head : own_head / group;
    first_head = kOwnsKeys ? own_head * group : own_head;
    walk = kOwnsKeys ? seeing_queries(c, s, first, first + own_count) : seen_keys(c, s, first, first + own_count);
    per_head = walk.begin < walk.end ? (walk.end - walk.begin + kColumns - 1) / kColumns : 0;
    const int steps = kOwnsKeys ? per_head * group : per_head;

    load_side(kOwnsKeys, first_head, m.own(0), m.own(1), first, kRows);
    copy_async_commit();
    if (!kOwnsKeys) load_terms(first_head, first, kRows, m.terms);
    if (steps > 0) bring(0);
    copy_async_commit();
    if (kOwnsKeys && steps > 0) load_terms(first_head, walk.begin, kColumns, m.terms);
    copy_async_wait<1>();
    block_barrier();
    typename A::Own own, own_second;
    own.load(m.own(0));
    own_second.load(m.own(1));
    Sums sums = {}, value_sums = {};
    double slope_sum = 0.0;
    for (int step = 0; step < steps; ++step) {
      // What is brought now arrives while this step is computed.
      float2 next_terms{};
      if (step + 1 < steps) {
        bring(step + 1);
        if (kOwnsKeys && int(threadIdx.x) < kColumns) next_terms = terms_of(head_at(step + 1), column_at(step + 1));
      }
      copy_async_commit();
      if (kExtras && drops(c)) draw(step);
      copy_async_wait<1>();
      block_barrier();
      compute(step, own, own_second, sums, value_sums, slope_sum);
      if (kOwnsKeys && int(threadIdx.x) < kColumns) m.terms[(step + 1) % 2 * kColumns + threadIdx.x] = next_terms;
      block_barrier();
    }
    if constexpr (kOwnsKeys) {
      write(sums, c.scale, g.grad_key, c.width);
      write(value_sums, 1.0f, g.grad_value, c.value_width);
    } else {
      write(sums, c.scale, g.grad_query, c.width);
      if (kExtras && g.slope_sums != nullptr) add_slope_sums(slope_sum);
    }
  }

 private:
  __device__ static int tiles(int rows) { return (rows + kRows - 1) / kRows; }

  // Of a step: its head of queries, and the first of the rows that are walked.
  __device__ int head_at(int step) const { return first_head + step / per_head; }
  __device__ int column_at(int step) const { return walk.begin + step % per_head * kColumns; }

  // Rows of (K, V) or (Q, dO) on their way to two tiles.
  __device__ void load_side(bool keys, int head, T* to, T* second, int from, int rows) const {
    const int batch = c.query_starts != nullptr ? 0 : s.number;
    if (keys) {
      load_tile<T, kWidth>(to, rows_of<T>(c.key, batch, kv_head, s.key_start, c.width), from, rows, s.keys);
      load_tile<T, kWidth>(second, rows_of<T>(c.value, batch, kv_head, s.key_start, c.value_width), from, rows, s.keys);
    } else {
      load_tile<T, kWidth>(to, rows_of<T>(c.query, batch, head, s.query_start, c.width), from, rows, s.queries);
      // Without a gradient of out, the rows of the queries, none of which is there, are zeros.
      const bool zero = g.grad_out.data == nullptr;
      load_tile<T, kWidth>(second,
                           zero ? rows_of<T>(c.query, batch, head, s.query_start, 0)
                                : rows_of<T>(g.grad_out, batch, head, s.query_start, c.value_width),
                           from, rows, zero ? 0 : s.queries);
    }
  }
  __device__ void bring(int step) const {
    load_side(!kOwnsKeys, head_at(step), m.walked(step, 0), m.walked(step, 1), column_at(step), kColumns);
  }

  // Of the query that this thread has of those from `query` on; of none, those of one that sees no key.
  __device__ float2 terms_of(int head, int query) const {
    const int i = query + int(threadIdx.x);
    if (i >= s.queries) return {INFINITY, 0.0f};
    return g.terms[head_of(c, s, head).row + i];
  }
  __device__ void load_terms(int head, int query, int rows, float2* to) const {
    static_assert(kRows <= A::kThreads && kColumns <= A::kThreads);
    if (int(threadIdx.x) < rows) to[threadIdx.x] = terms_of(head, query);
  }

  // The bits of dropout for a step. The threads of a word draw every so many of its blocks.
  __device__ void draw(int step) const {
    constexpr int kWords = Memory::kWords, kParts = A::kThreads / (Memory::kQueries * kWords);
    static_assert(kParts >= 1 && 32 % kParts == 0 && kParts * Memory::kQueries * kWords == A::kThreads);
    if (!kOwnsKeys && step % (64 / kColumns) != 0) return;  // those of the step before go on
    const int word = int(threadIdx.x) / kParts;
    const int query = (kOwnsKeys ? column_at(step) : first) + word / kWords;
    const int key = kOwnsKeys ? first + word % kWords * 64 : column_at(step);
    uint64_t bits = kept_keys(c, s, head_of(c, s, head_at(step)).row + query, key, int(threadIdx.x) % kParts, kParts);
    for (int mask = 1; mask < kParts; mask *= 2) bits |= shuffle_xor(bits, mask);
    if (int(threadIdx.x) % kParts == 0) m.kept[word] = bits;
  }
  __device__ bool kept(int step, int query, int key) const {
    const int bit = kOwnsKeys ? key : step % (64 / kColumns) * kColumns + key;
    return (m.kept[query * Memory::kWords + bit / 64] >> bit % 64 & 1) != 0;
  }

  __device__ __forceinline__ void compute(int step, const typename A::Own& own, const typename A::Own& own_second,
                                          Sums& sums, Sums& value_sums, double& slope_sum) const {
    const Head head = head_of(c, s, head_at(step));
    const T *walked = m.walked(step, 0), *second = m.walked(step, 1);
    const int rows = first + A::group_row(), columns = column_at(step);
    for (int strip = 0; strip < kColumns; strip += A::kStrip) {
      // Which queries and keys the group has of this strip, and what they see of each other.
      const int query = kOwnsKeys ? columns + strip : rows, key = kOwnsKeys ? rows : columns + strip;
      const int end = query + (kOwnsKeys ? A::kStrip : A::kGroupRows);
      const int end_key = key + (kOwnsKeys ? A::kGroupRows : A::kStrip);
      const Range seen = seen_keys(c, s, query, smaller_int(end, s.queries));
      if (query >= s.queries || larger_int(seen.begin, key) >= smaller_int(seen.end, end_key)) continue;
      const bool whole = end <= s.queries && all_seen(c, s, query, end, key, end_key);

      float weights[kCells], ds[kCells];
      A::multiply(own, walked, strip, weights);
      A::multiply(own_second, second, strip, ds);
      differentiate(head, step, strip, whole, weights, ds, slope_sum);
      if constexpr (kOwnsKeys) {
        if (g.grad_key.data != nullptr) A::accumulate(ds, walked, strip, sums, m.exchange);
        if (g.grad_value.data != nullptr) A::accumulate(weights, second, strip, value_sums, m.exchange + A::kExchange);
      } else {
        A::accumulate(ds, walked, strip, sums, m.exchange);
      }
    }
  }

  // From products to weights after dropout, and to the gradients of the products (but for the scale).
  __device__ __forceinline__ void differentiate(const Head& head, int step, int strip, bool whole,
                                                float (&weights)[kCells], float (&ds)[kCells],
                                                double& slope_sum) const {
    // Of a cell: the query and the key, in their tiles of scores.
    const auto query_of = [&](int cell) { return kOwnsKeys ? strip + A::column(cell) : A::row(cell); };
    const auto key_of = [&](int cell) { return kOwnsKeys ? A::row(cell) : strip + A::column(cell); };
    const int first_query = kOwnsKeys ? column_at(step) : first, first_key = kOwnsKeys ? first : column_at(step);
    const float2* terms = kOwnsKeys ? m.terms + step % 2 * kColumns : m.terms;

    const auto is_seen = [&](int cell) {
      const int query = first_query + query_of(cell);
      return query < s.queries && sees(c, s, query, first_key + key_of(cell));
    };
    // Scores below the log-sum-exp of their rows.
    float tangent[kCells] = {};
    if (!kExtras || (c.cap == 0.0f && head.mask == nullptr && head.slope == 0.0f)) {
      FASTGEN_UNROLL
      for (int i = 0; i < kCells; ++i) weights[i] = weights[i] * c.product_scale - terms[query_of(i)].x;
      if (!whole) {
        FASTGEN_UNROLL
        for (int i = 0; i < kCells; ++i) weights[i] = is_seen(i) ? weights[i] : -INFINITY;
      }
    } else {
      FASTGEN_UNROLL
      for (int i = 0; i < kCells; ++i) {
        float score = -INFINITY;
        if (whole || is_seen(i)) {
          score = finish_score(c, s, head, first_query + query_of(i), first_key + key_of(i), weights[i], tangent[i]);
        }
        // No weight is above 1. Where a mask of the lowest number hides all keys, the log-sum-exp is too large to say
        // more, and inf would meet a gradient of 0.
        const float below = score - terms[query_of(i)].x;
        weights[i] = below > 0.0f ? 0.0f : below;
      }
    }
    FASTGEN_UNROLL
    for (float& weight : weights) weight = exp2_approx(weight);
    if (kExtras && drops(c)) {
      FASTGEN_UNROLL
      for (int i = 0; i < kCells; ++i) {
        const float share = kept(step, query_of(i), key_of(i)) ? c.kept_weight : 0.0f;
        ds[i] = weights[i] * (ds[i] * share - terms[query_of(i)].y);
        weights[i] *= share;
      }
    } else {
      FASTGEN_UNROLL
      for (int i = 0; i < kCells; ++i) ds[i] = weights[i] * (ds[i] - terms[query_of(i)].y);
    }
    if (kExtras && !kOwnsKeys && g.slope_sums != nullptr) {
      float total = 0.0f;
      FASTGEN_UNROLL
      for (int i = 0; i < kCells; ++i) {
        total += ds[i] * fabsf(float(first_query + query_of(i) + s.shift - first_key - key_of(i)));
      }
      slope_sum -= double(total);
    }
    if (kExtras && c.cap > 0.0f) {
      FASTGEN_UNROLL
      for (int i = 0; i < kCells; ++i) ds[i] *= 1.0f - tangent[i] * tangent[i];
    }
  }

  __device__ __forceinline__ void write(const Sums& from, float factor, const Tensor4& to, int width) const {
    if (to.data == nullptr) return;
    const int batch = c.query_starts != nullptr ? 0 : s.number;
    const Rows<T> rows = kOwnsKeys ? rows_of<T>(to, batch, kv_head, s.key_start + first, width)
                                   : rows_of<T>(to, batch, first_head, s.query_start + first, width);
    A::for_pairs(from, [&](int row, int column, float a, float b) {
      if (row >= own_count || column >= width) return;
      T* at = const_cast<T*>(rows.data) + row * rows.row + column;
      if (width % 2 == 0) {
        A::store_pair(at, a * factor, b * factor);
      } else {
        narrow(a * factor, at);
        if (column + 1 < width) narrow(b * factor, at + 1);
      }
    });
  }

  __device__ void add_slope_sums(double sum) const {
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (threadIdx.x % 32 == 0) m.partial[threadIdx.x / 32] = sum;
    block_barrier();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < A::kThreads / 32; ++warp) sum += m.partial[warp];
    g.slope_sums[blockIdx.x] = sum;
  }

  const AttentionGradients& g;
  const AttentionCall& c;
  Memory m;
  Sequence s;
  int first, own_count;  // of the rows that the block owns
  int kv_head, first_head;
  Range walk;  // over rows of the other side, for each head of queries
  int per_head;
};

template <class A, bool kExtras>
__global__ void __launch_bounds__(A::kThreads, A::kBlocks) gradients_kernel(const AttentionGradients g) {
  GradientBlock<A, kExtras>(g).run();
}

// The gradient of a slope from those of the blocks, by a warp, in one order. grid: the slopes, of each sequence where
// these have their own, by head. rows: of a block.
__global__ void __launch_bounds__(32)
    slopes_kernel(const AttentionGradients g, int rows, bool per_sequence, float* out) {
  const AttentionCall& c = g.c;
  const int head = int(blockIdx.x) % c.heads, number = int(blockIdx.x) / c.heads, lane = int(threadIdx.x);
  const int end = per_sequence ? number + 1 : c.sequences;
  double sum = 0.0;
  for (int n = (per_sequence ? number : 0) + lane / 8; n < end; n += 4) {
    const int64_t tiles = (sequence_at(c, n).queries + rows - 1) / rows;
    const int64_t unit = (c.query_starts != nullptr ? c.first_units[n] : n * c.heads * tiles) + head * tiles;
    for (int64_t tile = lane % 8; tile < tiles; tile += 8) sum += g.slope_sums[unit + tile];
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) out[blockIdx.x] = float(sum);
}

}  // namespace
}  // namespace fastgen
