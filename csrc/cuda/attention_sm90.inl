// The forward pass of attention for compute capability 9.0, in the manner of Shah et al., "FlashAttention-3: fast and
// accurate attention with asynchrony and low-precision", 2024. A block stays on its multiprocessor and works on one
// tile of 128 query rows after the other. One warpgroup only copies; two compute, 64 rows each, with products that run
// while they go on:
//
//   issue S(t) = Q K(t)^T and O += P(t-1) V(t-1);  wait for S(t);  P(t) of S(t);  wait for O
//
// and they take turns at issuing, so that the one's products run under the other's weights.
//
// What is copied goes through a ring of slots of 64 rows: of a tile of queries the first and the second half, then
// K(0), K(1), V(0), K(2), V(1), ..., V(last), then the next tile's. All count the slots in this order, so that which
// slot is which, and whether it has arrived, needs no other word.
#pragma once

#include "attention_forward.h"
#include "warpgroup_ring.h"

namespace fastgen {
namespace {

struct PersistentCall : ForwardCall {
  unsigned units;     // tiles of rows of all heads
  unsigned together;  // heads whose tiles are dealt out together
};

constexpr int kSm90Rows = 128;  // of a block

// One of the two warpgroups that compute.
template <class T, int kWidth>
class Consumer {
  using R = Ring<T, kWidth>;
  static constexpr int kSteps = kWidth / 16;

 public:
  __device__ Consumer(const PersistentCall& call, const R& ring, int group, T* staging)
      : c(call), ring_(ring), turns_(group), group_(group), staging_(staging) {}
  __device__ void finish() const { turns_.finish(); }

  __device__ __forceinline__ void run(const Unit& u) {
    const Sequence& s = u.sequence;
    const int warp_row = group_ * 64 + int(threadIdx.x) % kGroup / 32 * 16;
    fragment_.start(warp_row);
    for (int half = 0; half < 2; ++half, ++next_) {
      ring_.wait_full(next_);
      if (half == group_) ring_.load_left(next_, query_);
      ring_.release(next_);
    }

    // Steps of the block, of which this group has those from first_step on: in step t keys t are multiplied, and values
    // t - 1.
    const int tiles = (larger_int(u.keys.end - u.keys.begin, 0) + kTileKeys - 1) / kTileKeys;
    const Range seen = seen_keys(c, s, u.first + group_ * 64, u.first + smaller_int(group_ * 64 + 64, u.count));
    const bool works = group_ * 64 < u.count && seen.begin < seen.end;
    const int first_step = works ? (seen.begin - u.keys.begin) / kTileKeys : tiles + 1;
    const int last_step = works ? (seen.end - u.keys.begin + kTileKeys - 1) / kTileKeys : tiles + 1;
    int step = 0;
    for (; step < smaller_int(first_step, tiles + int(tiles > 0)); ++step) pass(step, tiles);
    if (works) {
      const Range rows = {u.first + warp_row, u.first + smaller_int(warp_row + 16, u.count)};
      wait_for(step, tiles);
      turns_.take();
      warpgroup_fence(query_, fragment_.score);
      multiply_keys();
      turns_.pass();
      warpgroup_wait<0>(fragment_.score);
      release(step, tiles);
      float fade[2];
      weigh(u, rows, u.keys.begin + step * kTileKeys, fade);
      pack_weights();
      for (++step; step < last_step; ++step) {
        wait_for(step, tiles);
        turns_.take();
        warpgroup_fence(query_, fragment_.score, weights_, fragment_.out);
        multiply_keys();
        multiply_values(next_ + 1);
        turns_.pass();
        warpgroup_wait<1>(fragment_.score);
        ring_.release(next_);
        weigh(u, rows, u.keys.begin + step * kTileKeys, fade);
        // The wait stands in both branches: without a branch between them, ptxas puts it before the weights. So all
        // four warps take the same one.
        if (named_barrier_any(3 + group_, kGroup, fade[0] != 1.0f || fade[1] != 1.0f)) {
          warpgroup_wait<0>(fragment_.out, weights_);
          fragment_.rescale(fade);
        } else {
          warpgroup_wait<0>(fragment_.out, weights_);
        }
        ring_.release(next_ + 1);
        next_ += 2;
        pack_weights();
      }
      wait_for(step, tiles);
      turns_.take();
      warpgroup_fence(weights_, fragment_.out);
      multiply_values(next_ + unsigned(step < tiles));
      turns_.pass();
      warpgroup_wait<0>(fragment_.out, weights_);
      release(step, tiles);
      ++step;
    }
    for (; step <= tiles && tiles > 0; ++step) pass(step, tiles);
    fragment_.put(c, u, 0, staging_);
  }

 private:
  // The slots of a step: keys, but for the last one, and values, but for the first.
  __device__ void wait_for(int step, int tiles) const {
    if (step < tiles) ring_.wait_full(next_);
    if (step > 0) ring_.wait_full(next_ + unsigned(step < tiles));
  }
  __device__ void release(int step, int tiles) {
    if (step < tiles) ring_.release(next_++);
    if (step > 0) ring_.release(next_++);
  }
  // A step without work for this group.
  __device__ void pass(int step, int tiles) {
    wait_for(step, tiles);
    turns_.take();
    turns_.pass();
    release(step, tiles);
  }

  __device__ __forceinline__ void multiply_keys() {
    ring_.multiply_rows(fragment_.score, query_, next_);
    warpgroup_commit();
  }
  __device__ __forceinline__ void multiply_values(unsigned slot) {
    ring_.add_product(fragment_.out, weights_, slot);
    warpgroup_commit();
  }

  // From products with the keys from j on to weights.
  __device__ __forceinline__ void weigh(const Unit& u, const Range& rows, int j, float (&fade)[2]) {
    if (!all_seen(c, u.sequence, rows.begin, rows.end, j, j + kTileKeys)) fragment_.finish(c, u, j);
    fragment_.weigh(c.product_scale, fade);
  }
  __device__ __forceinline__ void pack_weights() {
    FASTGEN_UNROLL
    for (int k = 0; k < kPairs; ++k) fragment_.pack_weights(k, weights_[k]);
  }

  const PersistentCall& c;
  R ring_;
  Turns turns_;
  int group_;
  T* staging_;
  unsigned next_ = 0;  // slot
  Fragment<T, kWidth, false> fragment_;
  uint32_t query_[kSteps][4], weights_[kPairs][4];
};

template <int kWidth>
constexpr size_t kSm90Shared = Ring<uint16_t, kWidth>::kBytes + kSm90Rows * kWidth * sizeof(uint16_t);

template <class T, int kWidth>
__global__ void __launch_bounds__(kRingThreads, 1) attention_sm90_kernel(const PersistentCall c) {
  const Ring<T, kWidth> ring(dynamic_shared() + kSm90Rows * kWidth * sizeof(T));
  if (threadIdx.x == 0) ring.init();
  block_barrier();
  const auto for_units = [&](const auto& body) {
    for_numbers(c.units, [&](unsigned n) {
      const unsigned unit = c.query_starts == nullptr ? unit_in_order(n, c.units, c.tiles, c.together) : n;
      body(unit_of(c, unit, 0, kTileKeys));
    });
  };
  const int group = shuffle(int(threadIdx.x) / kGroup, 0);  // so that the compiler knows it is the warp's
  if (group == 0) {
    lower_registers<kProducerRegisters>();
    Producer<Ring<T, kWidth>> producer(ring);
    for_units([&](const Unit& u) {
      const Sequence& s = u.sequence;
      RowStream<T, kWidth> query(rows_of<T>(c.query, s.number, u.first_head, s.query_start, c.width), u.first,
                                 u.first + u.count);
      const int first = u.keys.begin;
      RowStream<T, kWidth> key(rows_of<T>(c.key, s.number, u.kv_head, s.key_start, c.width), first, s.keys);
      RowStream<T, kWidth> value(rows_of<T>(c.value, s.number, u.kv_head, s.key_start, c.value_width), first, s.keys);
      for (int half = 0; half < 2; ++half) producer.bring(query);
      for (int j = first; j < u.keys.end; j += kTileKeys) {
        producer.bring(key);
        if (j > first) producer.bring(value);
        if (j + kTileKeys >= u.keys.end) producer.bring(value);
      }
    });
    producer.finish();
  } else {
    raise_registers<kConsumerRegisters>();
    Consumer<T, kWidth> consumer(c, ring, group - 1, reinterpret_cast<T*>(dynamic_shared()));
    for_units([&](const Unit& u) { consumer.run(u); });
    consumer.finish();
  }
}

}  // namespace
}  // namespace fastgen
