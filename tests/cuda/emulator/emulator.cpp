// A CUDA device for tests: each thread of a grid is a fibre on one thread of the CPU, and another one goes on wherever
// one waits. Which one is drawn at random, with some of them slow for a while, shared memory is NaN before it is
// written, and copies arrive at once or as late as they may: a barrier that is missing shows as a wrong result, one
// that not all reach as an error.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../../csrc/common/dtype.h"
#include "emulated_warpgroup.h"

// Saves the registers that a function must keep and the stack pointer in *from, and takes those of `to`.
extern "C" void fastgen_switch_stack(void** from, void* to);
asm(R"(
.text
.globl fastgen_switch_stack
.hidden fastgen_switch_stack
.type fastgen_switch_stack, @function
fastgen_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace fastgen::emulator {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned char kPoison = 0xff;  // in every byte of a number: NaN

int device_multiprocessors = 4;
size_t device_shared_limit = 227 * 1024;
int device_capability = 80;
int64_t launches = 0, products = 0, clustered = 0;

// Memory that ends where a page without access begins: what is written behind it ends the process at once.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t room = (bytes + page - 1) / page * page;
    all_ = room + page;
    start_ =
        static_cast<unsigned char*>(mmap(nullptr, all_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED) throw std::runtime_error("emulated device: no memory");
    mprotect(start_ + room, page, PROT_NONE);
    end_ = start_ + room;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(start_, all_); }
  unsigned char* end() const { return end_; }

 private:
  unsigned char *start_, *end_;
  size_t all_;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int by;  // thread
};

struct Block;

struct Fibre {
  Block* block;
  uint3 thread;
  int number;  // in the block
  void* stack_pointer;
  bool done, ready;
  std::vector<Copy> copies;              // not yet committed
  std::deque<std::vector<Copy>> groups;  // not yet waited for
  int64_t fenced = 0;                    // when it last called fence_shared
  // Registers, by where they begin, as they were at the last warpgroup_fence that named them.
  std::map<const unsigned char*, std::vector<unsigned char>> named;
};

// Sums of a warp that products of its warpgroup add to: in `now`, while the threads' own are NaN. They are given back
// with the group of products `last`.
struct Sums {
  std::array<float*, kLanes> of;
  size_t count;  // of a thread
  std::vector<float> now;
  int64_t last;
};

// A warp's part of a product: 16 rows.
struct Pending {
  std::array<Product, kLanes> of;
  std::array<std::array<uint32_t, 4>, kLanes> a;  // as it was when the product was issued
  bool done = false;
  int64_t group;
};

struct Warp {
  const char* kind = nullptr;
  int arrived = 0;
  const void* inputs[kLanes];
  void* outputs[kLanes];
  std::deque<Pending> products;  // not yet waited for
  std::vector<Sums> sums;
  int64_t groups = 0;   // of products: committed
  size_t steps = 0;     // of its warpgroup that it has taken
  bool fenced = false;  // since the last wait
  int registers = 0;    // of a thread
};

// A barrier that counts arrivals, as it stands in 64 bits of shared memory.
struct Arrivals {
  uint32_t magic;
  uint16_t phase, missing : 8, each : 8;  // ends with 0 missing of `each`
  static constexpr uint32_t kMagic = 0xba221e25;
};

struct Named {
  int threads = 0, arrived = 0;
  bool any = false, any_before = false;  // of those that arrived; of the last ones that went on
  std::vector<Fibre*> waiting;
};

struct Cluster {
  std::vector<Block*> blocks;
  int waiting = 0;  // at its barrier
};

struct Block {
  uint3 index;
  Cluster* cluster;
  std::vector<Fibre*> fibres;
  std::vector<Warp> warps;
  std::vector<std::vector<const void*>>
      steps;                     // of each warpgroup: places in the kernel that its warps come to together
  int waiting = 0, running = 0;  // at the barrier; not yet through
  bool begun = false;
  std::vector<Fibre*> for_arrivals, for_registers;
  std::array<Named, 16> named;
  int free_registers = 0;
  struct Written {
    int64_t when = 0;
    int by = 0;
  };
  std::vector<Written> copied;  // of each 16 bytes of shared memory: by an asynchronous copy that arrived
  std::unique_ptr<Guarded> shared;
  size_t shared_bytes;

  // It begins where 1024 divides the address: up to 1023 bytes lie between its end and the page behind.
  unsigned char* shared_begin() const { return shared->end() - (shared_bytes + 1023) / 1024 * 1024; }
  unsigned char* shared_end() const { return shared_begin() + shared_bytes; }
};

class Run {
 public:
  Run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared, int cluster)
      : kernel(kernel), grid(grid), size(block), shared_bytes(shared), cluster(cluster) {}

  const std::function<void()>& kernel;
  dim3 grid, size;
  size_t shared_bytes;
  int cluster;  // blocks of one
  Fibre* current = nullptr;
  std::vector<Fibre*> ready;
  int64_t remaining = 0, idle = 0;  // threads not yet through; yields since anything else happened
  int64_t clock = 0;
  std::string error;
  void* outside = nullptr;  // stack pointer of the caller
  std::mt19937 order{std::mt19937(20260101)};

  void blocks(const std::vector<uint3>& indices) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fibre>> fibres;
    std::map<unsigned, Cluster> clusters;
    const int threads = int(size.x * size.y * size.z);
    for (const uint3& index : indices) {
      auto& block = *blocks.emplace_back(std::make_unique<Block>());
      block.index = index;
      block.cluster = &clusters[index.x / unsigned(cluster)];  // of grids of one dimension
      block.cluster->blocks.push_back(&block);
      block.running = threads;
      block.warps.resize(size_t(threads / kLanes));
      block.steps.resize(block.warps.size() / 4 + 1);
      const int registers = std::min(65536 / threads / 8 * 8, 255);
      for (Warp& warp : block.warps) warp.registers = registers;
      block.free_registers = 65536 - registers * threads;
      block.copied.resize(shared_bytes / 16);
      block.shared = std::make_unique<Guarded>(shared_bytes);
      block.shared_bytes = shared_bytes;
      std::fill(block.shared_begin(), block.shared->end(), kPoison);
      for (int t = 0; t < threads; ++t) {
        auto& fibre = *fibres.emplace_back(std::make_unique<Fibre>());
        fibre.block = &block;
        fibre.number = t;
        fibre.thread = {unsigned(t) % size.x, unsigned(t) / size.x % size.y, unsigned(t) / size.x / size.y};
        fibre.done = fibre.ready = false;
        start(fibre, fibres.size() - 1);
        block.fibres.push_back(&fibre);
        wake(&fibre);
      }
    }
    remaining = int64_t(fibres.size());
    switch_to_next(&outside);
    for (const auto& block : blocks) {
      if (error.empty()) error = left_behind(*block);
    }
    if (!error.empty()) throw std::runtime_error("emulated device: " + error);
  }

  void wake(Fibre* fibre) {
    if (fibre->ready || fibre->done) return;
    fibre->ready = true;
    ready.push_back(fibre);
    idle = 0;
  }

  // Lets another fibre go on; the present one comes back once somebody woke it.
  void wait() { switch_to_next(&current->stack_pointer); }

  void fail(const std::string& what) {
    if (error.empty()) error = what;
    void* unused;
    leave(&unused);
  }

  void switch_to_next(void** from) {
    if (ready.empty()) {
      if (remaining > 0 && error.empty()) error = "deadlock: " + where_all_wait();
      return leave(from);
    }
    const size_t i = draw_ready();
    Fibre* next = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
    next->ready = false;
    if (next == current && from != &outside) return;
    current = next;
    fastgen_switch_stack(from, next->stack_pointer);
  }

 private:
  // For a while one warp, or a warpgroup, or none, goes on only when others cannot.
  size_t draw_ready() {
    if (slow_for-- == 0) {
      const int warps = std::max(int(size.x * size.y * size.z) / kLanes, 1);
      slow_for = 1 << order() % 15;
      slow_width = std::array{0, 1, 4}[order() % 3];
      slow = int(order() % unsigned(warps)) / std::max(slow_width, 1) * slow_width;
    }
    std::uniform_int_distribution<size_t> any(0, ready.size() - 1);
    size_t i = any(order);
    const auto is_slow = [&] {
      const int warp = ready[i]->number / kLanes;
      return warp >= slow && warp < slow + slow_width;
    };
    for (int tries = 0; tries < 16 && is_slow(); ++tries) i = any(order);
    return i;
  }
  int slow = 0, slow_width = 0, slow_for = 0;  // the first one and how many; switches until others are

  void leave(void** from) {
    current = nullptr;
    fastgen_switch_stack(from, outside);
  }

  // What is wrong with a block all of whose threads are through.
  static std::string left_behind(const Block& block) {
    const auto untouched = [](unsigned char byte) { return byte == kPoison; };
    if (!std::all_of(block.shared_end(), block.shared->end(), untouched)) return "written behind shared memory";
    for (size_t w = 0; w < block.warps.size(); ++w) {
      if (!block.warps[w].products.empty()) return "products that nobody waits for";
      if (block.warps[w].steps != block.steps[w / 4].size()) return "a warp has left its warpgroup alone";
    }
    for (const Named& named : block.named) {
      if (named.arrived > 0) return "arrivals at a named barrier that nobody waits for";
    }
    return "";
  }

  void start(Fibre& fibre, size_t number) {
    static std::vector<std::unique_ptr<Guarded>> stacks;  // used again: to make one costs more than a small kernel
    if (number == stacks.size()) stacks.push_back(std::make_unique<Guarded>(kStack));
    auto* top = reinterpret_cast<void**>(stacks[number]->end()) - 2;  // the entry must find the stack off 16 by 8
    *--top = nullptr;                                                 // where the entry would return to
    *--top = reinterpret_cast<void*>(&Run::entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fibre.stack_pointer = top;
  }

  static void entry();
  std::string where_all_wait() const;
};

Run* running = nullptr;

std::string name(const Fibre& fibre) {
  return "thread " + std::to_string(fibre.number) + " of block (" + std::to_string(fibre.block->index.x) + ", " +
         std::to_string(fibre.block->index.y) + ", " + std::to_string(fibre.block->index.z) + ")";
}

void release_barrier(Block& block) {
  if (block.waiting == 0 || block.waiting < block.running) return;
  block.waiting = 0;
  for (Fibre* fibre : block.fibres) running->wake(fibre);
}

void release_barrier(Cluster& cluster) {
  int left = 0;
  for (const Block* block : cluster.blocks) left += block->running;
  if (cluster.waiting == 0 || cluster.waiting < left) return;
  cluster.waiting = 0;
  for (Block* block : cluster.blocks) {
    for (Fibre* fibre : block->fibres) running->wake(fibre);
  }
}

void Run::entry() {
  running->current->block->begun = true;
  running->kernel();
  Fibre& fibre = *running->current;
  fibre.done = true;
  Block& block = *fibre.block;
  --block.running;
  --running->remaining;
  running->idle = 0;
  release_barrier(block);
  release_barrier(*block.cluster);
  void* unused;
  running->switch_to_next(&unused);
}

std::string Run::where_all_wait() const {
  return std::to_string(remaining) + " threads wait for others that do not come";
}

}  // namespace

const uint3& thread_index() { return running->current->thread; }
const uint3& block_index() { return running->current->block->index; }
const dim3& block_size() { return running->size; }
const dim3& grid_size() { return running->grid; }
int lane() { return running->current->number % kLanes; }
int multiprocessors() { return device_multiprocessors; }
size_t shared_limit() { return device_shared_limit; }

unsigned char* shared_memory() { return running->current->block->shared_begin(); }

void check_shared(const void* p, size_t bytes, size_t alignment) {
  const auto* at = static_cast<const unsigned char*>(p);
  const Block& block = *running->current->block;
  if (at < block.shared_begin() || at + bytes > block.shared_end())
    running->fail("outside of shared memory, " + name(*running->current));
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) running->fail("misaligned, " + name(*running->current));
}

void block_barrier() {
  Block& block = *running->current->block;
  ++block.waiting;
  running->idle = 0;
  if (block.waiting == block.running) {
    running->wake(running->current);
    for (Fibre* fibre : block.fibres) running->wake(fibre);
    block.waiting = 0;
  }
  running->wait();
}

void cluster_barrier() {
  Cluster& cluster = *running->current->block->cluster;
  ++cluster.waiting;
  running->idle = 0;
  release_barrier(cluster);
  running->wait();
}

unsigned char* shared_memory_of(int rank, const void* p) {
  check_shared(p, 1, 1);
  for (const Block* block : running->current->block->cluster->blocks) {
    if (int(block->index.x % unsigned(running->cluster)) != rank) continue;
    if (!block->begun) running->fail("shared memory of a block that has not begun, " + name(*running->current));
    if (block->running == 0) running->fail("shared memory of a block that has ended, " + name(*running->current));
    return block->shared_begin();
  }
  running->fail("no such block of the cluster, " + name(*running->current));
  return nullptr;
}

void with_warp(const char* kind, const void* input, void* output,
               const std::function<void(const void* const*, void* const*)>& compute) {
  Fibre& fibre = *running->current;
  Warp& warp = fibre.block->warps[size_t(fibre.number / kLanes)];
  if (warp.arrived == 0) {
    warp.kind = kind;
  } else if (std::string(warp.kind) != kind) {
    running->fail(std::string("lanes of a warp at ") + warp.kind + " and at " + kind + ", " + name(fibre));
  }
  warp.inputs[lane()] = input;
  warp.outputs[lane()] = output;
  running->idle = 0;
  if (++warp.arrived < kLanes) return running->wait();
  compute(warp.inputs, warp.outputs);
  warp.arrived = 0;
  const size_t first = size_t(fibre.number / kLanes * kLanes);
  for (size_t i = 0; i < kLanes; ++i) running->wake(fibre.block->fibres[first + i]);
  running->wait();
}

void yield() {
  if (++running->idle > 100'000 + 100 * int64_t(running->ready.size())) {
    running->fail("nobody sets the flag that threads wait for, " + name(*running->current));
  }
  const int64_t idle = running->idle;
  running->wake(running->current);
  running->idle = idle;
  running->wait();
}

namespace {
void arrive(const Copy& copy) {
  Block& block = *running->current->block;
  const auto place = size_t(static_cast<unsigned char*>(copy.to) - block.shared_begin()) / 16;
  block.copied[place] = {++running->clock, copy.by};
  if (copy.from != nullptr) {
    memcpy(copy.to, copy.from, copy.bytes);
  } else {
    memset(copy.to, 0, copy.bytes);
  }
}
}  // namespace

// Where no thread has to wait, others go on now and then all the same.
void pause() {
  if (running->order() % 4 != 0) return;
  running->wake(running->current);
  running->wait();
}

// A copy arrives at once, over what others may still be reading, or as late as it may: drawn at random.
void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) running->fail("a misaligned copy, " + name(*running->current));
  const Copy copy{to, from, bytes, running->current->number};
  if (running->order() % 2 == 0) return arrive(copy);
  running->current->copies.push_back(copy);
}

void copy_async_commit() {
  Fibre& fibre = *running->current;
  fibre.groups.push_back(std::move(fibre.copies));
  fibre.copies.clear();
  pause();
}

void copy_async_wait(int pending) {
  auto& groups = running->current->groups;
  while (groups.size() > size_t(pending)) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.pop_front();
  }
}

// ---------------------------------------------------------------------------------------------------
// What compute capability 9.0 has besides (csrc/cuda/warpgroup.h)

uint32_t shared_address(const void* p) {
  check_shared(p, 1, 1);
  return uint32_t(static_cast<const unsigned char*>(p) - shared_memory());
}

namespace {
Arrivals& arrivals_at(uint64_t* barrier) {
  check_shared(barrier, sizeof(uint64_t), sizeof(uint64_t));
  auto& arrivals = *reinterpret_cast<Arrivals*>(barrier);
  static_assert(sizeof arrivals == sizeof *barrier);
  if (arrivals.magic != Arrivals::kMagic)
    running->fail("a barrier that was not initialised, " + name(*running->current));
  return arrivals;
}

void wake_all(std::vector<Fibre*>& waiting) {
  for (Fibre* fibre : std::exchange(waiting, {})) running->wake(fibre);
}
}  // namespace

void init_arrivals(uint64_t* barrier, int arrivals) {
  check_shared(barrier, sizeof(uint64_t), sizeof(uint64_t));
  const Arrivals fresh{Arrivals::kMagic, 0, uint8_t(arrivals), uint8_t(arrivals)};
  memcpy(barrier, &fresh, sizeof fresh);
}

void arrive(uint64_t* barrier) {
  pause();
  Arrivals& arrivals = arrivals_at(barrier);
  running->idle = 0;
  if (--arrivals.missing > 0) return;
  arrivals.missing = arrivals.each;
  ++arrivals.phase;
  wake_all(running->current->block->for_arrivals);
}

void wait_arrivals(uint64_t* barrier, uint32_t parity) {
  // `phase` is the one that goes on; the one before has the other parity.
  while (arrivals_at(barrier).phase % 2 == parity) {
    running->current->block->for_arrivals.push_back(running->current);
    running->wait();
  }
}

void named_barrier(int number, int threads, bool wait) {
  if (number < 1 || number > 15 || threads % kLanes != 0) running->fail("no such named barrier");
  Named& named = running->current->block->named[size_t(number)];
  if (named.arrived > 0 && named.threads != threads) running->fail("a named barrier for different numbers of threads");
  named.threads = threads;
  running->idle = 0;
  if (wait) named.waiting.push_back(running->current);
  if (++named.arrived == threads) {
    named.arrived = 0;
    named.any_before = std::exchange(named.any, false);
    wake_all(named.waiting);
  }
  if (wait) running->wait();
}

bool named_barrier_any(int number, int threads, bool value) {
  if (number < 1 || number > 15) running->fail("no such named barrier");
  Named& named = running->current->block->named[size_t(number)];
  named.any |= value;
  named_barrier(number, threads, true);
  return named.any_before;  // all of them have to come again before it changes
}

namespace {

Warp& this_warp() { return running->current->block->warps[size_t(running->current->number / kLanes)]; }

// A step that all warps of a warpgroup take at the same place of the kernel, each when it gets there (PTX ISA: the
// .aligned of wgmma and of setmaxnreg). The whole warp calls; the last of its lanes runs `compute`.
void step(const char* kind, const void* place, const void* input,
          const std::function<void(const void* const*)>& compute) {
  Fibre& fibre = *running->current;
  Warp& warp = this_warp();
  with_warp(kind, input, nullptr, [&](const void* const* inputs, void* const*) {
    auto& steps = fibre.block->steps[size_t(fibre.number / kLanes / 4)];
    if (warp.steps == steps.size()) steps.push_back(place);
    if (steps[warp.steps++] != place) running->fail(std::string("a warp alone at ") + kind + ", " + name(fibre));
    compute(inputs);
  });
}

}  // namespace

void set_registers(int registers, bool more) {
  if (registers < 24 || registers > 256 || registers % 8 != 0) running->fail("no such number of registers");
  step(more ? "raise_registers" : "lower_registers", __builtin_return_address(0), nullptr, [](const void* const*) {});
  Fibre& fibre = *running->current;
  Block& block = *fibre.block;
  Warp& warp = block.warps[size_t(fibre.number / kLanes)];
  while (true) {
    const int by = registers - warp.registers;  // the first of the warp does it for all
    if (by != 0 && more != (by > 0)) running->fail("registers lowered to more, or raised to less, " + name(fibre));
    if (kLanes * by <= block.free_registers) {
      block.free_registers -= kLanes * by;
      warp.registers = registers;
      return wake_all(block.for_registers);
    }
    block.for_registers.push_back(&fibre);
    running->wait();
  }
}

void fence_shared() { running->current->fenced = ++running->clock; }

namespace {

// Element (k, n) of a matrix of 16 rows, as its descriptor says (PTX ISA, "Canonical layouts"); rows: they stand there
// as they are, or else its columns do.
uint16_t element(uint64_t descriptor, bool rows, int k, int n) {
  const Fibre& fibre = *running->current;
  const Block& block = *fibre.block;
  const auto bytes = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t leading = bytes(16), stride = bytes(32);
  if ((descriptor >> 49 & 7) != 0) running->fail("a descriptor with a base offset, which is not emulated");
  const int mode = int(descriptor >> 62);
  const uint32_t units = mode == 0 ? 1 : 16 >> mode;  // of 16 bytes, beside each other before the pattern repeats
  // Along what is contiguous in memory, and across it.
  const auto along = uint32_t(rows ? n : k), across = uint32_t(rows ? k : n);
  const uint32_t unit = along / 8;
  uint32_t at = bytes(0) + across % 8 * units * 16 + along % 8 * 2;
  if (mode == 0) {
    at += rows ? unit * stride + across / 8 * leading : unit * leading + across / 8 * stride;
  } else {
    at += unit % units * 16 + unit / units * leading + across / 8 * stride;
  }
  at ^= (at >> 7 & (units - 1)) << 4;
  if (at + 2 > block.shared_bytes) running->fail("a product reads outside of shared memory, " + name(fibre));
  const auto& [when, by] = block.copied[at / 16];
  const int64_t reader = block.fibres[size_t(fibre.number / kLanes * kLanes)]->fenced;
  if (when > std::max(block.fibres[size_t(by)]->fenced, reader)) {
    running->fail("a product reads what was copied without a fence, " + name(fibre));
  }
  uint16_t bits;
  memcpy(&bits, block.shared_begin() + at, sizeof bits);
  return bits;
}

void complete(Warp& warp, Pending& pending) {
  if (std::exchange(pending.done, true)) return;
  const Product& first = pending.of[0];
  auto& sums = *std::find_if(warp.sums.begin(), warp.sums.end(), [&](const Sums& s) { return s.of[0] == first.d; });
  std::vector<float> b(size_t(16 * first.columns));
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < first.columns; ++n) {
      b[size_t(k * first.columns + n)] = first.widen(element(first.b, first.rows, k, n));
    }
  }
  for (int t = 0; t < kLanes; ++t) {
    const Product& of = pending.of[size_t(t)];
    if (memcmp(of.a, pending.a[size_t(t)].data(), sizeof pending.a[0]) != 0) {
      running->fail("the left side of a product was written to before a wait, " + name(*running->current));
    }
  }
  for (int row = 0; row < 16; ++row) {
    float a[16];
    for (int k = 0; k < 16; ++k) {
      const auto& registers = pending.a[size_t(row % 8 * 4 + k % 8 / 2)];
      const uint32_t pair = registers[size_t(row / 8 + k / 8 * 2)];
      a[k] = first.widen(uint16_t(k % 2 == 0 ? pair : pair >> 16));
    }
    for (int n = 0; n < first.columns; ++n) {
      float& sum = sums.now[size_t(row % 8 * 4 + n % 8 / 2) * sums.count + size_t(n / 8 * 4 + row / 8 * 2 + n % 2)];
      if (!first.add) sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[k] * b[size_t(k * first.columns + n)];
    }
  }
}

bool is_poison(const float* d, size_t count) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(d);
  return std::all_of(bytes, bytes + count * sizeof(float), [](unsigned char byte) { return byte == kPoison; });
}

const unsigned char* begin_of(const void* registers) { return static_cast<const unsigned char*>(registers); }

bool has(const Registers& all, const void* one) {
  return begin_of(one) >= begin_of(all.first) && begin_of(one) < begin_of(all.first) + all.bytes;
}

void check_at_rest(std::initializer_list<Registers> registers) {
  const Warp& warp = this_warp();
  for (const Registers& named : registers) {
    for (const Sums& pending : warp.sums) {
      if (has(named, pending.of[size_t(lane())])) {
        running->fail("sums are taken for done that no wait was for, " + name(*running->current));
      }
    }
    for (const Pending& pending : warp.products) {
      if (has(named, pending.of[size_t(lane())].a)) {
        running->fail("a left side is taken for free that no wait was for, " + name(*running->current));
      }
    }
  }
}

// That a fence named these registers, and they have stayed as they were.
void check_fenced(const char* what, const void* registers, size_t bytes) {
  const auto& named = running->current->named;
  const auto* first = begin_of(registers);
  const auto behind = named.upper_bound(first);
  const auto fail = [&](const char* why) { running->fail(std::string(what) + why + ", " + name(*running->current)); };
  if (behind == named.begin()) fail(" that no fence has named");
  const auto& [begin, then] = *std::prev(behind);
  if (first + bytes > begin + then.size()) fail(" that no fence has named");
  if (memcmp(first, then.data() + (first - begin), bytes) != 0) fail(" written to behind the fence");
}

}  // namespace

void warpgroup_fence(std::initializer_list<Registers> registers) {
  step("warpgroup_fence", __builtin_return_address(0), nullptr, [](const void* const*) {});
  check_at_rest(registers);
  for (const Registers& all : registers) {
    running->current->named[begin_of(all.first)].assign(begin_of(all.first), begin_of(all.first) + all.bytes);
  }
  this_warp().fenced = true;
}

// The part of a warp is computed at once, or as late as it may be: drawn at random.
void warpgroup_multiply_add(const Product& product) {
  const void* place = __builtin_return_address(0);
  if (!this_warp().fenced) running->fail("a product without a fence, " + name(*running->current));
  check_fenced("a left side", product.a, 4 * sizeof(uint32_t));
  const auto& pending = this_warp().sums;
  const auto is_same = [&](const Sums& sums) { return sums.of[size_t(lane())] == product.d; };
  if (std::none_of(pending.begin(), pending.end(), is_same)) {
    check_fenced("sums", product.d, size_t(product.columns / 2) * sizeof(float));
  }
  step("warpgroup_multiply_add", place, &product, [](const void* const* inputs) {
    Warp& warp = this_warp();
    Pending& pending = warp.products.emplace_back();
    for (size_t t = 0; t < kLanes; ++t) {
      pending.of[t] = *static_cast<const Product*>(inputs[t]);
      memcpy(pending.a[t].data(), pending.of[t].a, sizeof pending.a[t]);
      if (pending.of[t].b != pending.of[0].b) running->fail("lanes of a warp have different descriptors");
    }
    pending.group = warp.groups;
    const auto count = size_t(pending.of[0].columns / 2);
    auto sums =
        std::find_if(warp.sums.begin(), warp.sums.end(), [&](const Sums& s) { return s.of[0] == pending.of[0].d; });
    if (sums == warp.sums.end()) {
      sums = warp.sums.insert(sums, Sums{{}, count, {}, 0});
      for (size_t t = 0; t < kLanes; ++t) {
        sums->of[t] = pending.of[t].d;
        sums->now.insert(sums->now.end(), sums->of[t], sums->of[t] + count);
        memset(sums->of[t], kPoison, count * sizeof(float));
      }
    }
    sums->last = warp.groups;
    ++products;
    if (running->order() % 2 == 0) {
      for (Pending& one : warp.products) complete(warp, one);
    }
  });
}

void warpgroup_commit() {
  step("warpgroup_commit", __builtin_return_address(0), nullptr, [](const void* const*) { ++this_warp().groups; });
}

void warpgroup_wait(int pending, std::initializer_list<Registers> registers) {
  step("warpgroup_wait", __builtin_return_address(0), nullptr, [pending](const void* const*) {
    Warp& warp = this_warp();
    warp.fenced = false;
    const int64_t end = warp.groups - pending;
    while (!warp.products.empty() && warp.products.front().group < end) {
      complete(warp, warp.products.front());
      warp.products.pop_front();
    }
    std::erase_if(warp.sums, [end](const Sums& sums) {
      if (sums.last >= end) return false;
      for (size_t t = 0; t < kLanes; ++t) {
        if (!is_poison(sums.of[t], sums.count)) running->fail("sums were written to before a wait");
        std::copy_n(sums.now.begin() + int64_t(t * sums.count), sums.count, sums.of[t]);
      }
      return true;
    });
  });
  check_at_rest(registers);
}

int compute_capability() { return device_capability; }

void run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared, bool cooperative, int cluster) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("emulated device: ") + what);
  };
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  require(threads > 0 && threads <= 1024 && threads % kLanes == 0,
          "expected whole warps, at most 1024 threads a block");
  require(blocks > 0 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, "no such grid");
  require(shared <= device_shared_limit, "more shared memory than a block may have");
  if (cooperative) {
    const size_t each = size_t(blocks_per_multiprocessor(0, int(threads), shared));
    require(blocks <= each * size_t(device_multiprocessors), "a cooperative launch of more blocks than fit at once");
  }
  require(cluster == 1 || device_capability >= 90, "there are no clusters before compute capability 9.0");
  require(cluster <= 8 && blocks % size_t(cluster) == 0, "expected whole clusters of at most 8 blocks");
  ++launches;
  clustered += cluster > 1;
  Run state(kernel, grid, block, shared, cluster);
  running = &state;
  struct End {
    ~End() { running = nullptr; }
  } end;
  std::vector<uint3> indices;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) indices.push_back({x, y, z});
    }
  }
  std::shuffle(indices.begin(), indices.end(), state.order);
  if (cooperative) return state.blocks(indices);
  for (const uint3& index : indices) state.blocks({index});
}

}  // namespace fastgen::emulator

extern "C" {
__attribute__((visibility("default"))) int64_t fastgen_emulated_launches() { return fastgen::emulator::launches; }
__attribute__((visibility("default"))) int64_t fastgen_emulated_products() { return fastgen::emulator::products; }
__attribute__((visibility("default"))) int64_t fastgen_emulated_clustered() { return fastgen::emulator::clustered; }
__attribute__((visibility("default"))) void fastgen_emulated_device(int multiprocessors, int64_t shared_limit,
                                                                    int capability) {
  fastgen::emulator::device_multiprocessors = multiprocessors;
  fastgen::emulator::device_shared_limit = size_t(shared_limit);
  fastgen::emulator::device_capability = capability;
}
}
