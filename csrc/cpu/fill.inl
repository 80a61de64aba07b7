// A run of the random stream into memory, written once over Isa (after a vec_*.h, which defines it).
#pragma once

#include "../common/distributions.h"

namespace fastgen {
namespace {

struct NoAhead {
  FASTGEN_MEMBER void operator()(int64_t) const {}
};

// out[0 .. count) = elements element .. element + count of the stream.
//
// Words first, then values, a batch of steps at a time: each of the two loops is short enough for the
// processor to overlap several of its turns, which hides the latency of the ten rounds and of the
// polynomials. In one loop they are three times as long as its window.
//
// ahead(step) is called once a step: a caller asks there for the memory that it will want next, spread out
// over the time that the noise takes.
template <class T, class Distribution, class Ahead = NoAhead>
__attribute__((noinline)) void fill(T* out, uint64_t element, int64_t count, const PhiloxKey& key,
                                    const Distribution& distribution, const Ahead& ahead = Ahead()) {
  using F = typename Work<T>::F;
  using U = typename Work<T>::U;
  constexpr int kPerBlock = Work<T>::kPerBlock, kBatch = 16, kChains = Isa::kChains;
  static_assert(kBatch % kChains == 0, "");
  U even[kBatch], odd[kBatch];
  F y, y_odd, first, second;
  uint64_t block = element / kPerBlock;
  int lead = int(element % kPerBlock);
  int64_t step = 0;
  while (count > 0) {
    const int64_t needed = (lead + count + kStep<T> - 1) / kStep<T>;
    const int steps = needed < kBatch ? int(needed) : kBatch;
    int made = 0;
    for (; made + kChains <= steps; made += kChains) {
      words<T>(block + uint64_t(made) * Isa::kBlocks, key, reinterpret_cast<U(&)[kChains]>(even[made]),
               reinterpret_cast<U(&)[kChains]>(odd[made]));
    }
    for (; made < steps; ++made) {
      words<T>(block + uint64_t(made) * Isa::kBlocks, key, reinterpret_cast<U(&)[1]>(even[made]),
               reinterpret_cast<U(&)[1]>(odd[made]));
    }
    block += uint64_t(steps) * Isa::kBlocks;
    for (int i = 0; i < steps; ++i) {
      ahead(step++);
      distribution(even[i], odd[i], y, y_odd);
      interleave(y, y_odd, first, second);
      if (lead == 0 && count >= kStep<T>) {
        store(out, first);
        store(out + kLanes<T>, second);
        out += kStep<T>;
        count -= kStep<T>;
      } else {  // the head, where the first element stands inside a block, and the tail
        T pair[kStep<T>];
        store(pair, first);
        store(pair + kLanes<T>, second);
        const int wanted = count < kStep<T> - lead ? int(count) : kStep<T> - lead;
        memcpy(out, pair + lead, sizeof(T) * size_t(wanted));
        out += wanted;
        count -= wanted;
        lead = 0;
      }
    }
  }
}

}  // namespace
}  // namespace fastgen
