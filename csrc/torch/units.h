// Work in units of unequal length, shared by the threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "tensor.h"

namespace fastgen {

constexpr double kGrainProducts = 1 << 18;  // multiply-adds below which a second thread does not pay

inline Tensor bytes(int64_t count) { return empty_cpu(&count, 1, ScalarType::Byte); }

// Threads that are worth waking for so many multiply-adds.
inline int64_t useful_threads(double products) {
  const double useful = std::min(products / kGrainProducts, double(torch::stable::get_num_threads()));
  return std::max<int64_t>(1, int64_t(useful));
}

// Runs body(unit, scratch) for all units. Units differ in length: a thread that is through with one takes the next.
template <class Body>
inline void run_units(int64_t units, int64_t bytes_of_unit, double products, const Body& body) {
  if (units == 0) return;
  const int64_t useful = int64_t(std::min(products / kGrainProducts, 1e6));
  const int64_t threads = std::max<int64_t>(1, std::min({int64_t(torch::stable::get_num_threads()), units, useful}));
  // Short units are taken several at a time: their results share cache lines, and so do all threads the counter.
  const int64_t step = std::max<int64_t>(1, int64_t(kGrainProducts / 2 * double(units) / std::max(products, 1.0)));
  std::atomic<int64_t> next{0};
  const auto work = [&](void* own) {
    for (int64_t first; (first = next.fetch_add(step, std::memory_order_relaxed)) < units;) {
      for (int64_t unit = first; unit < std::min(first + step, units); ++unit) body(unit, own);
    }
  };
  constexpr int64_t kSmall = 16384;  // in a short call an allocation is a good part
  if (threads == 1 && bytes_of_unit <= kSmall) {
    alignas(64) char scratch[kSmall];
    return work(scratch);
  }
  const Tensor scratch = bytes(threads * bytes_of_unit + 64);
  const uintptr_t address = (reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr()) + 63) / 64 * 64;
  const auto work_each = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(reinterpret_cast<void*>(address + uintptr_t(i * bytes_of_unit)));
  };
  if (threads == 1) return work_each(0, 1);
  torch::stable::parallel_for(0, threads, 1, work_each);
}

}  // namespace fastgen
