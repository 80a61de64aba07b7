// What the attention kernels for compute capability 9.0 are built of. A block of three warpgroups stays on its
// multiprocessor: one copies tiles of 64 rows to a ring of slots in shared memory, two compute with them. All count the
// slots in one order, so that which slot is which, and whether it has arrived, needs no other word.
#pragma once

#include "attention.h"
#include "warpgroup.h"

namespace fastgen {
namespace {

// The number that block `block` of `blocks` deals with in this round: back and forth, as those of a round become
// smaller from the first on.
FASTGEN_FN unsigned number_in_round(unsigned round, unsigned block, unsigned blocks) {
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}
// The unit that is number n of those dealt out, where head h has the units h tiles to h tiles + tiles - 1 and these
// become smaller: the large ones of all heads come first, but only as many heads take part at a time as have what they
// read in the cache, `together`.
FASTGEN_FN unsigned unit_in_order(unsigned n, unsigned units, unsigned tiles, unsigned together) {
  const unsigned set = together * tiles;
  const unsigned first = n / set * together, heads = min(together, units / tiles - first);
  return (first + n % set % heads) * tiles + n % set / heads;
}

// Calls body(number) for all numbers below `count` that this block deals with.
template <class Body>
__device__ __forceinline__ void for_numbers(unsigned count, const Body& body) {
  unsigned n;
  for (unsigned round = 0; (n = number_in_round(round, blockIdx.x, gridDim.x)) < count; ++round) body(n);
}

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kRingThreads = 3 * kGroup;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// kWidth: 64 or 128. kBeside: bytes that stand beside a slot, a multiple of 16.
template <class T_, int kWidth_, int kSlots_ = 8, int kBeside_ = 0>
class Ring {
 public:
  using T = T_;
  static constexpr int kRows = 64, kWidth = kWidth_, kSlots = kSlots_, kBeside = kBeside_, kSteps = kWidth / 16;
  static constexpr int kPart = kRows * 64;  // elements of a slot in 64 columns: these stand together
  static constexpr int kSlot = kRows * kWidth;
  static constexpr size_t kBytes = kSlots * (kSlot * sizeof(T) + kBeside + 2 * sizeof(uint64_t));

  // memory: 1024 divides its address.
  __device__ explicit Ring(unsigned char* memory)
      : slots_(reinterpret_cast<T*>(memory)),
        full_(reinterpret_cast<uint64_t*>(memory + kSlots * (kSlot * sizeof(T) + kBeside))) {}

  // By one thread.
  __device__ void init() const {
    for (int i = 0; i < kSlots; ++i) {
      init_arrivals(full_ + i, kGroup / 32);
      init_arrivals(empty(i), 2 * kGroup / 32);
    }
  }

  __device__ T* slot(unsigned n) const { return slots_ + n % kSlots * kSlot; }
  __device__ unsigned char* beside(unsigned n) const {
    return reinterpret_cast<unsigned char*>(slots_ + kSlots * kSlot) + n % kSlots * kBeside;
  }
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

  // The left side of products: of a slot the 16 rows of this warp.
  __device__ __forceinline__ void load_left(unsigned n, uint32_t (&to)[kSteps][4]) const {
    const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) % kGroup / 32 * 16 + lane % 16;
    FASTGEN_UNROLL
    for (int k = 0; k < kSteps; ++k) load_matrices(to[k], slot(n) + at(row, k * 16 + lane / 16 * 8));
  }
  // d = left slot^T.
  __device__ __forceinline__ void multiply_rows(float (&d)[8][4], const uint32_t (&left)[kSteps][4], unsigned n) const {
    const uint64_t rows = matrix_descriptor(slot(n), 8 * kRowBytes, 16);
    FASTGEN_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const int behind = k / 4 * kPart * int(sizeof(T)) + k % 4 * 32;  // 16 columns are 32 bytes of a row
      warpgroup_multiply_add<T, false>(d, left[k], moved(rows, behind), k > 0);
    }
  }
  // d += left slot.
  __device__ __forceinline__ void add_product(float (&d)[kWidth / 8][4], const uint32_t (&left)[4][4],
                                              unsigned n) const {
    const uint64_t rows = matrix_descriptor(slot(n), 8 * kRowBytes, kPart * sizeof(T));
    FASTGEN_UNROLL
    for (int k = 0; k < kRows / 16; ++k) {
      warpgroup_multiply_add<T, true>(d, left[k], moved(rows, k * 16 * kRowBytes), true);
    }
  }

 private:
  static constexpr int kRowBytes = 64 * sizeof(T);

  __device__ uint64_t* empty(unsigned n) const { return full_ + kSlots + n % kSlots; }
  __device__ static void arrive_once(uint64_t* barrier) {
    warp_barrier();
    if (threadIdx.x % 32 == 0) arrive(barrier);
  }

  T* slots_;
  uint64_t* full_;
};

// Rows of a matrix, 64 at a time, as the warpgroup that copies reads them: the place of this thread, which has 16 bytes
// of every 16th row, twice so for a width of 128.
template <class T, int kWidth>
struct RowStream {
  static constexpr int kStep = kGroup / 8;

  // From row `first` on; those from `end` on are zero.
  __device__ RowStream(const Rows<T>& from, int first, int end) {
    const int row = int(threadIdx.x) % kGroup / 8, column = int(threadIdx.x) % 8 * 8;
    at = from.data + (first + row) * from.row + column;
    step = kStep * from.row;
    FASTGEN_UNROLL
    for (int part = 0; part < kWidth / 64; ++part) left[part] = column + part * 64 < from.width ? end - first - row : 0;
  }

  const T* at;
  int64_t step;
  int left[kWidth / 64];  // rows there are from `at` on, in each 64 columns
};

// The warpgroup that copies.
template <class R>
class Producer {
  using T = typename R::T;
  // Copies of so many slots are on their way at once. That a slot has arrived is said when the copies of the one kAhead
  // behind it have begun: those that compute are further behind by then, or wait and leave room for it.
  static constexpr int kAhead = 4;
  static_assert(kAhead < R::kSlots);

 public:
  __device__ explicit Producer(const R& ring) : ring_(ring) {}

  // The next 64 rows of a stream; and what stands beside them, at an address that 16 divides, or nothing.
  __device__ __forceinline__ void bring(RowStream<T, R::kWidth>& from, const void* beside = nullptr) {
    constexpr int kStep = RowStream<T, R::kWidth>::kStep;
    const int thread = int(threadIdx.x) % kGroup;
    ring_.wait_empty(next_);
    T* to = ring_.slot(next_) + R::at(thread / 8, thread % 8 * 8);
    FASTGEN_UNROLL
    for (int row = 0; row < R::kRows; row += kStep, from.at += from.step) {
      FASTGEN_UNROLL
      for (int part = 0; part < R::kWidth / 64; ++part) {
        copy_async16(to + part * R::kPart + row * 64, from.at + part * 64, row < from.left[part]);
      }
    }
    FASTGEN_UNROLL
    for (int& left : from.left) left -= R::kRows;
    if (R::kBeside > 0 && beside != nullptr && thread < R::kBeside / 16) {
      copy_async16(ring_.beside(next_) + 16 * thread, static_cast<const char*>(beside) + 16 * thread);
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

// Whose turn it is of the two warpgroups that compute, 0 and 1; 0 begins. Both take as many turns.
class Turns {
 public:
  __device__ explicit Turns(int group) : group_(group) {
    if (group_ == 1) pass();
  }
  __device__ void take() const { named_barrier_wait(1 + group_, 2 * kGroup); }
  __device__ void pass() const { named_barrier_arrive(2 - group_, 2 * kGroup); }
  __device__ void finish() const {
    if (group_ == 0) take();  // the last one that was passed
  }

 private:
  int group_;
};

}  // namespace
}  // namespace fastgen
