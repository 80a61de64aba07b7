// Threads that go through many short phases together, without a fork and a join for each.
#pragma once

#include <atomic>
#include <thread>

#include "tensor.h"

namespace fastgen {

// parallel_for does not promise that its bodies run at the same time: one thread may run them one after the other, or a
// second may come late. So a team is whoever has come by the time that the blocks of a first phase are all taken; who
// comes later finds nothing left to do.
class Team {
 public:
  class Member;

  // Runs first(i) for i < blocks, each once, and then, when all are done, body(member) on each thread of the team, of
  // which there are 1 to `most`. Bodies may wait for each other.
  template <class First, class Body>
  static void run(int64_t most, int64_t blocks, const First& first, const Body& body) {
    Team team;
    torch::stable::parallel_for(0, most, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) team.enter(blocks, first, body);
    });
  }

 private:
  template <class First, class Body>
  void enter(int64_t blocks, const First& first, const Body& body) {
    int64_t rank = joined_.load();
    do {
      if ((rank & kClosed) != 0) return;
    } while (!joined_.compare_exchange_weak(rank, rank + 1));
    for (int64_t i; (i = taken_.fetch_add(1)) < blocks;) {
      first(i);
      done_.fetch_add(1);
    }
    const int64_t size = joined_.fetch_or(kClosed) & ~kClosed;
    wait(done_, blocks);
    body(Member(*this, rank, size));
  }

  // Phases last microseconds, so a thread that waits keeps its core, unless there seem to be more threads than cores.
  static void wait(const std::atomic<int64_t>& count, int64_t target) {
    constexpr int kPatience = 1 << 14;
    for (int spins = 0; count.load(std::memory_order_acquire) < target; ++spins) {
      if (spins >= kPatience) {
        std::this_thread::yield();
        continue;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  static constexpr int64_t kClosed = int64_t(1) << 32;
  std::atomic<int64_t> joined_{0}, taken_{0}, done_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};  // at all barriers so far
};

class Team::Member {
 public:
  Member(Team& team, int64_t rank, int64_t size) : team_(team), rank_(rank), size_(size) {}

  bool first() const { return rank_ == 0; }
  // The member's share of [0, count).
  int64_t begin(int64_t count) const { return count * rank_ / size_; }
  int64_t end(int64_t count) const { return count * (rank_ + 1) / size_; }

  // Returns when all members have come here, and what they wrote before is there.
  void meet() {
    target_ += size_;
    team_.arrived_.fetch_add(1, std::memory_order_acq_rel);
    wait(team_.arrived_, target_);
  }

 private:
  Team& team_;
  int64_t rank_, size_, target_ = 0;
};

}  // namespace fastgen
