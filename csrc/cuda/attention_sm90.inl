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
#include "warpgroup.h"

namespace fastgen {
namespace {

struct PersistentCall : ForwardCall {
  unsigned units;     // tiles of rows of all heads
  unsigned together;  // heads whose tiles are dealt out together
};

// The unit that is number n of those dealt out, the ones that see most keys first. Only as many heads take part at a
// time as have their keys and values in the cache.
FASTGEN_FN unsigned unit_in_order(const PersistentCall& c, unsigned n) {
  if (c.query_starts != nullptr) return n;
  const unsigned tiles = unsigned(c.tiles), set = c.together * tiles;
  const unsigned first = n / set * c.together, heads = min(c.together, c.units / tiles - first);
  return (first + n % set % heads) * tiles + n % set / heads;
}

// The number that block `block` of `blocks` deals with in this round: back and forth, as those of a round become
// smaller from the first on.
FASTGEN_FN unsigned number_in_round(unsigned round, unsigned block, unsigned blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kSm90Rows = 128, kSm90Threads = 3 * kGroup;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <class T, int kWidth>
class Ring {
 public:
  static constexpr int kRows = 64, kSlots = 8;
  static constexpr int kPart = kRows * 64;  // elements of a slot in 64 columns: these stand together
  static constexpr int kSlot = kRows * kWidth;
  static constexpr size_t kBytes = kSlots * (kSlot * sizeof(T) + 2 * sizeof(uint64_t));

  // memory: 1024 divides its address.
  __device__ explicit Ring(unsigned char* memory)
      : slots_(reinterpret_cast<T*>(memory)), full_(reinterpret_cast<uint64_t*>(memory + kSlots * kSlot * sizeof(T))) {}

  // By one thread.
  __device__ void init() const {
    for (int i = 0; i < kSlots; ++i) {
      init_arrivals(full_ + i, kGroup / 32);
      init_arrivals(empty(i), 2 * kGroup / 32);
    }
  }

  __device__ T* slot(unsigned n) const { return slots_ + n % kSlots * kSlot; }
  // Row `row` of a slot, column `column` of kWidth.
  FASTGEN_MEMBER static int at(int row, int column) { return column / 64 * kPart + Tile<T, 64>::at(row, column % 64); }

  // What the warps that compute do: until slot number n has arrived, and once they have read it.
  __device__ void wait_full(unsigned n) const { wait_arrivals(full_ + n % kSlots, n / kSlots % 2); }
  __device__ void release(unsigned n) const { arrive_once(empty(n)); }

  // Those that copy: until the slot may be written, and once it has been.
  __device__ void wait_empty(unsigned n) const { wait_arrivals(empty(n), n / kSlots % 2 ^ 1); }  // at first it is
  __device__ void filled(unsigned n) const {
    fence_shared();
    arrive_once(full_ + n % kSlots);
  }

 private:
  __device__ uint64_t* empty(unsigned n) const { return full_ + kSlots + n % kSlots; }
  __device__ static void arrive_once(uint64_t* barrier) {
    warp_barrier();
    if (threadIdx.x % 32 == 0) arrive(barrier);
  }

  T* slots_;
  uint64_t* full_;
};

// The warpgroup that copies.
template <class T, int kWidth>
class Producer {
  using R = Ring<T, kWidth>;
  // Copies of so many slots are on their way at once. That a slot has arrived is said when the copies of the one kAhead
  // behind it have begun: those that compute are further behind by then, or wait and leave room for it.
  static constexpr int kAhead = 4;
  static_assert(kAhead < R::kSlots);

 public:
  __device__ explicit Producer(const R& ring) : ring_(ring) {}

  // Rows [first, first + 64), those from `end` on being zero.
  __device__ __forceinline__ void bring(const Rows<T>& from, int first, int end) {
    const int thread = int(threadIdx.x) % kGroup, row = thread / 8, column = thread % 8 * 8;
    constexpr int kStep = kGroup / 8;
    ring_.wait_empty(next_);
    T* to = ring_.slot(next_) + R::at(row, column);
    const int64_t stride = kStep * from.row;
    const T* at = from.data + (first + row) * from.row + column;
    FASTGEN_UNROLL
    for (int i = 0; i < R::kRows / kStep; ++i) {
      FASTGEN_UNROLL
      for (int part = 0; part < kWidth; part += 64) {
        const bool there = first + row + i * kStep < end && column + part < from.width;
        copy_async16(to + part / 64 * R::kPart + i * kStep * 64, at + part, there);
      }
      at += stride;
    }
    copy_async_commit();
    if (next_ >= kAhead) {
      copy_async_wait<kAhead>();
      ring_.filled(next_ - kAhead);
    }
    ++next_;
  }

  __device__ __forceinline__ void finish() const {
    copy_async_wait<0>();
    for (unsigned n = next_ < kAhead ? 0 : next_ - kAhead; n < next_; ++n) ring_.filled(n);
  }

 private:
  R ring_;
  unsigned next_ = 0;
};

// One of the two warpgroups that compute.
template <class T, int kWidth>
class Consumer {
  using R = Ring<T, kWidth>;
  static constexpr int kSteps = kWidth / 16;

 public:
  __device__ Consumer(const PersistentCall& call, const R& ring, int group, T* staging)
      : c(call), ring_(ring), group_(group), staging_(staging) {
    if (group_ == 1) pass_turn();
  }
  __device__ void finish() const {
    if (group_ == 0) take_turn();  // the last one that was passed
  }

  __device__ __forceinline__ void run(const Unit& u) {
    const Sequence& s = u.sequence;
    const int warp_row = group_ * 64 + int(threadIdx.x) % kGroup / 32 * 16;
    fragment_.start(warp_row);
    for (int half = 0; half < 2; ++half, ++next_) {
      ring_.wait_full(next_);
      if (half == group_) load_queries();
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
      take_turn();
      warpgroup_fence(fragment_.score);
      multiply_keys();
      pass_turn();
      warpgroup_wait<0>(fragment_.score);
      release(step, tiles);
      float fade[2];
      weigh(u, rows, u.keys.begin + step * kTileKeys, fade);
      pack_weights();
      for (++step; step < last_step; ++step) {
        wait_for(step, tiles);
        take_turn();
        warpgroup_fence(fragment_.score, fragment_.out);
        multiply_keys();
        multiply_values(next_ + 1);
        pass_turn();
        warpgroup_wait<1>(fragment_.score);
        ring_.release(next_);
        weigh(u, rows, u.keys.begin + step * kTileKeys, fade);
        // The wait stands in both branches: without a branch between them, ptxas puts it before the weights.
        if (fragment_.fades(fade)) {
          warpgroup_wait<0>(fragment_.out);
          fragment_.rescale(fade);
        } else {
          warpgroup_wait<0>(fragment_.out);
        }
        ring_.release(next_ + 1);
        next_ += 2;
        pack_weights();
      }
      wait_for(step, tiles);
      take_turn();
      warpgroup_fence(fragment_.out);
      multiply_values(next_ + unsigned(step < tiles));
      pass_turn();
      warpgroup_wait<0>(fragment_.out);
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
    take_turn();
    pass_turn();
    release(step, tiles);
  }

  __device__ void take_turn() const { named_barrier_wait(1 + group_, 2 * kGroup); }
  __device__ void pass_turn() const { named_barrier_arrive(2 - group_, 2 * kGroup); }

  // Of the slot that is next: this warp's 16 rows.
  __device__ __forceinline__ void load_queries() {
    const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) % kGroup / 32 * 16 + lane % 16;
    FASTGEN_UNROLL
    for (int k = 0; k < kSteps; ++k) load_matrices(query_[k], ring_.slot(next_) + R::at(row, k * 16 + lane / 16 * 8));
  }

  __device__ __forceinline__ void multiply_keys() {
    const uint64_t keys = matrix_descriptor(ring_.slot(next_), 8 * kRowBytes, 16);
    FASTGEN_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const int at = k / 4 * R::kPart * int(sizeof(T)) + k % 4 * 32;  // 16 columns are 32 bytes of a row
      warpgroup_multiply_add<T, false>(fragment_.score, query_[k], moved(keys, at), k > 0);
    }
    warpgroup_commit();
  }
  __device__ __forceinline__ void multiply_values(unsigned slot) {
    const uint64_t values = matrix_descriptor(ring_.slot(slot), 8 * kRowBytes, R::kPart * sizeof(T));
    FASTGEN_UNROLL
    for (int k = 0; k < kPairs; ++k) {
      warpgroup_multiply_add<T, true>(fragment_.out, weights_[k], moved(values, k * 16 * kRowBytes), true);
    }
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

  static constexpr int kRowBytes = 64 * sizeof(T);

  const PersistentCall& c;
  R ring_;
  int group_;
  T* staging_;
  unsigned next_ = 0;  // slot
  Fragment<T, kWidth, false> fragment_;
  uint32_t query_[kSteps][4], weights_[kPairs][4];
};

template <int kWidth>
constexpr size_t kSm90Shared = Ring<uint16_t, kWidth>::kBytes + kSm90Rows * kWidth * sizeof(uint16_t);

template <class T, int kWidth>
__global__ void __launch_bounds__(kSm90Threads, 1) attention_sm90_kernel(const PersistentCall c) {
  const Ring<T, kWidth> ring(dynamic_shared() + kSm90Rows * kWidth * sizeof(T));
  if (threadIdx.x == 0) ring.init();
  block_barrier();
  // Calls body(unit) for all units of this block.
  const auto for_units = [&](const auto& body) {
    unsigned n;
    for (unsigned round = 0; (n = number_in_round(round, blockIdx.x, gridDim.x)) < c.units; ++round) {
      body(unit_of(c, unit_in_order(c, n), 0, kTileKeys));
    }
  };
  const int group = shuffle(int(threadIdx.x) / kGroup, 0);  // so that the compiler knows it is the warp's
  if (group == 0) {
    lower_registers<kProducerRegisters>();
    Producer<T, kWidth> producer(ring);
    for_units([&](const Unit& u) {
      const Sequence& s = u.sequence;
      const Rows<T> query = rows_of<T>(c.query, s.number, u.first_head, s.query_start, c.width);
      const Rows<T> key = rows_of<T>(c.key, s.number, u.kv_head, s.key_start, c.width);
      const Rows<T> value = rows_of<T>(c.value, s.number, u.kv_head, s.key_start, c.value_width);
      for (int half = 0; half < 2; ++half) producer.bring(query, u.first + half * 64, u.first + u.count);
      for (int j = u.keys.begin; j < u.keys.end; j += kTileKeys) {
        producer.bring(key, j, s.keys);
        if (j > u.keys.begin) producer.bring(value, j - kTileKeys, s.keys);
        if (j + kTileKeys >= u.keys.end) producer.bring(value, j, s.keys);
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
