// The gradients of attention for compute capability 9.0: the two walks of attention_backward.inl, with the block of
// attention_sm90.inl. A block owns 128 rows of one side, 64 for each warpgroup that computes, in registers as the left
// sides of products; the other side comes through the ring as pairs of slots, (Q, dO) or (K, V), 64 rows at a time.
//
//   owning keys, pairs (Q, dO):    S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q
//   owning queries, pairs (K, V):  S = Q K^T,    dP = dO V^T,    dQ += dS K
//
// In a step the first two products with a pair, and the others with the pair before, are issued together; weights are
// made while the second run. Width 64: the sums of 64 keys of width 128 fill all registers.
#pragma once

#include "attention_gradients.h"
#include "warpgroup_ring.h"

namespace fastgen {
namespace {

struct PersistentGradients : AttentionGradients {
  unsigned units, tiles, together;  // see unit_in_order
};

constexpr int kOwnedRows = 128, kPairRows = 64;

template <bool kOwnsKeys>
struct GradientUnit {
  Sequence sequence;
  int kv_head, first_head, heads;  // of queries: all that read the keys
  int first, count;                // of the rows that the block owns
  int walk, tiles;                 // the first row of the other side, and tiles from there, for each head of queries

  FASTGEN_MEMBER GradientUnit(const PersistentGradients& g, unsigned n) {
    const AttentionCall& c = g.c;
    const unsigned unit = unit_in_order(n, g.units, g.tiles, g.together);
    const int head = int(unit / g.tiles), tile = int(unit % g.tiles);
    const int own_heads = kOwnsKeys ? c.kv_heads : c.heads, group = c.heads / c.kv_heads;
    sequence = sequence_at(c, head / own_heads);
    kv_head = kOwnsKeys ? head % own_heads : head % own_heads / group;
    first_head = kOwnsKeys ? kv_head * group : head % own_heads;
    heads = kOwnsKeys ? group : 1;
    // Under a causal mask the first keys and the last queries have most to do: they begin.
    first = (kOwnsKeys ? tile : int(g.tiles) - 1 - tile) * kOwnedRows;
    count = smaller_int(kOwnedRows, (kOwnsKeys ? sequence.keys : sequence.queries) - first);
    const Range range = walk_of(c, first, first + count);
    walk = range.begin / kPairRows * kPairRows;
    tiles = range.begin < range.end ? (range.end - walk + kPairRows - 1) / kPairRows : 0;
  }

  // Rows of the other side that have to do with the owned ones [begin, end).
  FASTGEN_MEMBER Range walk_of(const AttentionCall& c, int begin, int end) const {
    return kOwnsKeys ? seeing_queries(c, sequence, begin, end) : seen_keys(c, sequence, begin, end);
  }
};

// The log-sum-exp and delta of a pair's queries stand beside the slot of Q.
template <class T, bool kOwnsKeys>
using GradientRing = Ring<T, 64, 16, kOwnsKeys ? kPairRows * sizeof(float2) : 0>;

// One of the two warpgroups that compute.
template <class T, bool kOwnsKeys>
class GradientConsumer {
  using R = GradientRing<T, kOwnsKeys>;
  using U = GradientUnit<kOwnsKeys>;
  static constexpr int kBlocks = kPairRows / 8;

 public:
  __device__ GradientConsumer(const PersistentGradients& gradients, const R& ring, int group, T* staging)
      : g(gradients), c(gradients.c), ring_(ring), turns_(group), group_(group), staging_(staging) {}
  __device__ void finish() const { turns_.finish(); }

  __device__ __forceinline__ void run(const U& u) {
    warp_row_ = group_ * 64 + int(threadIdx.x) % kGroup / 32 * 16;
    for (int i = 0; i < 4; ++i, ++next_) {  // the halves of the first matrix, then those of the second
      ring_.wait_full(next_);
      if (i == group_) ring_.load_left(next_, own_);
      if (i == 2 + group_) ring_.load_left(next_, own_second_);
      ring_.release(next_);
    }
    clear(sums_);
    clear(value_sums_);
    if constexpr (!kOwnsKeys) {
      FASTGEN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = u.first + own_row(r);
        const int64_t head = int64_t(u.sequence.number) * c.heads + u.first_head;
        terms_[r] = row < u.sequence.queries ? g.terms[head * g.terms_rows + row] : float2{INFINITY, 0.0f};
      }
    }
    const Range range = u.walk_of(c, u.first + group_ * 64, u.first + smaller_int(group_ * 64 + 64, u.count));
    const bool works = group_ * 64 < u.count && range.begin < range.end;
    const int first_step = works ? (range.begin - u.walk) / kPairRows : u.tiles + 1;
    const int last_step = works ? (range.end - u.walk + kPairRows - 1) / kPairRows : u.tiles + 1;
    if (u.tiles > 0) {
      for (int head = 0; head < u.heads; ++head) walk(u, first_step, last_step);
    }
    write(u);
  }

 private:
  // All steps of a head: of step t the pair is t, but for the last one, and the pair before t - 1, but for the first.
  __device__ __forceinline__ void walk(const U& u, int first_step, int last_step) {
    int step = 0;
    for (; step < smaller_int(first_step, u.tiles + 1); ++step) pass(u, step);
    if (first_step < last_step) {
      wait_for(u, step);
      turns_.take();
      fence_products();
      multiply();
      turns_.pass();
      warpgroup_wait<0>(scores_, gradients_);
      differentiate(u, step);
      pack_cells();
      release_before(u, step);
      for (++step; step < last_step; ++step) {
        wait_for(u, step);
        turns_.take();
        fence_products();
        fence_sums();
        multiply();
        accumulate();
        turns_.pass();
        warpgroup_wait<1>(scores_, gradients_);
        differentiate(u, step);
        wait_for_sums();
        release_before(u, step);
        pack_cells();
      }
      wait_for(u, step);
      turns_.take();
      fence_sums();
      accumulate();
      turns_.pass();
      wait_for_sums();
      release_before(u, step);
      ++step;
    }
    for (; step <= u.tiles; ++step) pass(u, step);
  }

  // next_ is the first slot of a step's own pair.
  __device__ void wait_for(const U& u, int step) const {
    if (step == u.tiles) return;
    ring_.wait_full(next_);
    ring_.wait_full(next_ + 1);
  }
  // Ends a step: nobody of this warp reads the pair before any more.
  __device__ void release_before(const U& u, int step) {
    if (step > 0) {
      ring_.release(next_ - 2);
      ring_.release(next_ - 1);
    }
    if (step < u.tiles) next_ += 2;
  }
  // A step without work for this group.
  __device__ void pass(const U& u, int step) {
    wait_for(u, step);
    turns_.take();
    turns_.pass();
    release_before(u, step);
  }

  __device__ __forceinline__ void fence_products() { warpgroup_fence(own_, own_second_, scores_, gradients_); }
  __device__ __forceinline__ void fence_sums() {
    if constexpr (kOwnsKeys) {
      warpgroup_fence(left_gradients_, left_weights_, sums_, value_sums_);
    } else {
      warpgroup_fence(left_gradients_, sums_);
    }
  }
  __device__ __forceinline__ void multiply() {
    ring_.multiply_rows(scores_, own_, next_);
    ring_.multiply_rows(gradients_, own_second_, next_ + 1);
    warpgroup_commit();
  }
  __device__ __forceinline__ void accumulate() {
    ring_.add_product(sums_, left_gradients_, next_ - 2);
    if constexpr (kOwnsKeys) ring_.add_product(value_sums_, left_weights_, next_ - 1);
    warpgroup_commit();
  }
  __device__ __forceinline__ void wait_for_sums() {
    if constexpr (kOwnsKeys) {
      warpgroup_wait<0>(sums_, value_sums_, left_gradients_, left_weights_);
    } else {
      warpgroup_wait<0>(sums_, left_gradients_);
    }
  }

  __device__ int own_row(int r) const { return warp_row_ + int(threadIdx.x) % 32 / 4 + 8 * r; }
  __device__ static int column(int n) { return n * 8 + int(threadIdx.x) % 4 * 2; }

  // From products to weights, in scores_, and the gradients of the products but for the scale.
  __device__ __forceinline__ void differentiate(const U& u, int step) {
    const Sequence& s = u.sequence;
    const int j = u.walk + step * kPairRows;
    const auto* terms = reinterpret_cast<const float4*>(ring_.beside(next_));  // of two queries each
    FASTGEN_UNROLL
    for (int n = 0; n < kBlocks; ++n) {
      float4 two{};
      if constexpr (kOwnsKeys) two = terms[column(n) / 2];
      FASTGEN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float lse = kOwnsKeys ? (e % 2 == 0 ? two.x : two.z) : terms_[e / 2].x;
        const float delta = kOwnsKeys ? (e % 2 == 0 ? two.y : two.w) : terms_[e / 2].y;
        scores_[n][e] = exp2_approx(scores_[n][e] * c.product_scale - lse);
        gradients_[n][e] -= delta;
      }
    }
    const int first = u.first + warp_row_, end = u.first + smaller_int(warp_row_ + 16, u.count);
    const bool whole =
        kOwnsKeys ? all_seen(c, s, j, j + kPairRows, first, end) : all_seen(c, s, first, end, j, j + kPairRows);
    if (!whole) {
      FASTGEN_UNROLL
      for (int n = 0; n < kBlocks; ++n) {
        FASTGEN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int own = u.first + own_row(e / 2), other = j + column(n) + e % 2;
          if (!sees(c, s, kOwnsKeys ? other : own, kOwnsKeys ? own : other)) scores_[n][e] = 0.0f;
        }
      }
    }
    FASTGEN_UNROLL
    for (int n = 0; n < kBlocks; ++n) {
      FASTGEN_UNROLL
      for (int e = 0; e < 4; ++e) gradients_[n][e] *= scores_[n][e];
    }
  }

  // Results of a product are, in pairs, the left side of the next.
  __device__ __forceinline__ void pack_cells() {
    FASTGEN_UNROLL
    for (int k = 0; k < kPairRows / 16; ++k) {
      FASTGEN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * k + i / 2, e = i % 2 * 2;
        if constexpr (kOwnsKeys) left_weights_[k][i] = pack<T>(scores_[n][e], scores_[n][e + 1]);
        left_gradients_[k][i] = pack<T>(gradients_[n][e], gradients_[n][e + 1]);
      }
    }
  }

  __device__ __forceinline__ void write(const U& u) const {
    if constexpr (kOwnsKeys) {
      write_rows(u, sums_, c.scale, g.grad_key, u.kv_head, c.width);
      write_rows(u, value_sums_, 1.0f, g.grad_value, u.kv_head, c.value_width);
    } else {
      write_rows(u, sums_, c.scale, g.grad_query, u.first_head, c.width);
    }
  }
  // Through shared memory, so that whole pieces of 16 bytes are written.
  __device__ __forceinline__ void write_rows(const U& u, const float (&sums)[8][4], float factor, const Tensor4& to,
                                             int head, int width) const {
    if (to.data == nullptr) return;
    using Layout = Tile<T, 64>;
    const int lane = lane_now();
    warp_barrier();  // the rows of a warp are its own; it has read what stood there
    FASTGEN_UNROLL
    for (int r = 0; r < 2; ++r) {
      FASTGEN_UNROLL
      for (int n = 0; n < 8; ++n) {
        const uint32_t two = pack<T>(sums[n][2 * r] * factor, sums[n][2 * r + 1] * factor);
        *reinterpret_cast<uint32_t*>(staging_ + Layout::at(warp_row_ + lane / 4 + 8 * r, n * 8 + lane % 4 * 2)) = two;
      }
    }
    warp_barrier();
    const Rows<T> rows = rows_of<T>(to, u.sequence.number, head, u.first, width);
    for (int i = lane; i < 16 * 8; i += 32) {
      const int row = warp_row_ + i / 8, piece = i % 8 * 8;
      if (row >= u.count || piece >= width) continue;
      *reinterpret_cast<uint4*>(const_cast<T*>(rows.data) + row * rows.row + piece) =
          *reinterpret_cast<const uint4*>(staging_ + Layout::at(row, piece));
    }
  }

  __device__ static void clear(float (&x)[8][4]) {
    FASTGEN_UNROLL
    for (auto& four : x) four[0] = four[1] = four[2] = four[3] = 0.0f;
  }

  const PersistentGradients& g;
  const AttentionCall& c;
  R ring_;
  Turns turns_;
  int group_;
  T* staging_;         // [kOwnedRows][64]
  unsigned next_ = 0;  // slot
  int warp_row_;       // of the block
  uint32_t own_[4][4], own_second_[4][4], left_weights_[4][4], left_gradients_[4][4];
  float scores_[8][4], gradients_[8][4];
  float sums_[8][4], value_sums_[8][4];  // dK or dQ; dV
  float2 terms_[2];                      // of the owned queries
};

template <class T, bool kOwnsKeys>
constexpr size_t kGradientsShared = kOwnedRows * 64 * sizeof(T) + GradientRing<T, kOwnsKeys>::kBytes;

template <class T, bool kOwnsKeys>
__global__ void __launch_bounds__(kRingThreads, 1) gradients_sm90_kernel(const PersistentGradients g) {
  const AttentionCall& c = g.c;
  const GradientRing<T, kOwnsKeys> ring(dynamic_shared() + kOwnedRows * 64 * sizeof(T));
  if (threadIdx.x == 0) ring.init();
  block_barrier();
  const int group = shuffle(int(threadIdx.x) / kGroup, 0);  // so that the compiler knows it is the warp's
  if (group == 0) {
    lower_registers<kProducerRegisters>();
    Producer<GradientRing<T, kOwnsKeys>> producer(ring);
    for_numbers(g.units, [&](unsigned n) {
      const GradientUnit<kOwnsKeys> u(g, n);
      const Sequence& s = u.sequence;
      const auto stream = [&](const Tensor4& of, int head, int width, int first, int end) {
        return RowStream<T, 64>(rows_of<T>(of, s.number, head, 0, width), first, end);
      };
      const int own_head = kOwnsKeys ? u.kv_head : u.first_head, end = u.first + u.count;
      auto own = stream(kOwnsKeys ? c.key : c.query, own_head, c.width, u.first, end);
      auto own_second = stream(kOwnsKeys ? c.value : g.grad_out, own_head, c.value_width, u.first, end);
      for (int half = 0; half < 2; ++half) producer.bring(own);
      for (int half = 0; half < 2; ++half) producer.bring(own_second);
      for (int head = u.first_head; head < u.first_head + u.heads; ++head) {
        const int of = kOwnsKeys ? head : u.kv_head, last = kOwnsKeys ? s.queries : s.keys;
        auto walked = stream(kOwnsKeys ? c.query : c.key, of, c.width, u.walk, last);
        auto second = stream(kOwnsKeys ? g.grad_out : c.value, of, c.value_width, u.walk, last);
        const float2* terms = g.terms + (int64_t(s.number) * c.heads + head) * g.terms_rows + u.walk;
        for (int tile = 0; tile < u.tiles; ++tile, terms += kPairRows) {
          producer.bring(walked, kOwnsKeys ? terms : nullptr);
          producer.bring(second);
        }
      }
    });
    producer.finish();
  } else {
    raise_registers<kConsumerRegisters>();
    GradientConsumer<T, kOwnsKeys> consumer(g, ring, group - 1, reinterpret_cast<T*>(dynamic_shared()));
    for_numbers(g.units, [&](unsigned n) { consumer.run(GradientUnit<kOwnsKeys>(g, n)); });
    consumer.finish();
  }
}

}  // namespace
}  // namespace fastgen
