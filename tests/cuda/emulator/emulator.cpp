// A CUDA device for tests: each thread of a grid is a fibre on one thread of the CPU, and another one goes on wherever
// one waits. Which one is drawn at random, shared memory is NaN before it is written, and copies arrive at once or as
// late as they may: a barrier that is missing shows as a wrong result, one that not all reach as an error.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/common/dtype.h"
#include "emulated_device.h"

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
int64_t launches = 0;

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
};

struct Warp {
  const char* kind = nullptr;
  int arrived = 0;
  const void* inputs[kLanes];
  void* outputs[kLanes];
};

struct Block {
  uint3 index;
  std::vector<Fibre*> fibres;
  std::vector<Warp> warps;
  int waiting = 0, running = 0;  // at the barrier; not yet through
  std::unique_ptr<Guarded> shared;
  size_t shared_bytes;

  // It begins where 128 divides the address: up to 127 bytes lie between its end and the page behind.
  unsigned char* shared_begin() const { return shared->end() - (shared_bytes + 127) / 128 * 128; }
  unsigned char* shared_end() const { return shared_begin() + shared_bytes; }
};

class Run {
 public:
  Run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared)
      : kernel(kernel), grid(grid), size(block), shared_bytes(shared) {}

  const std::function<void()>& kernel;
  dim3 grid, size;
  size_t shared_bytes;
  Fibre* current = nullptr;
  std::vector<Fibre*> ready;
  int64_t remaining = 0, idle = 0;  // threads not yet through; yields since anything else happened
  std::string error;
  void* outside = nullptr;  // stack pointer of the caller
  std::mt19937 order{std::mt19937(20260101)};

  void blocks(const std::vector<uint3>& indices) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fibre>> fibres;
    const int threads = int(size.x * size.y * size.z);
    for (const uint3& index : indices) {
      auto& block = *blocks.emplace_back(std::make_unique<Block>());
      block.index = index;
      block.running = threads;
      block.warps.resize(size_t(threads / kLanes));
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
      const auto untouched = [](unsigned char byte) { return byte == kPoison; };
      if (!std::all_of(block->shared_end(), block->shared->end(), untouched)) error = "written behind shared memory";
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
    const size_t i = std::uniform_int_distribution<size_t>(0, ready.size() - 1)(order);
    Fibre* next = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
    next->ready = false;
    if (next == current && from != &outside) return;
    current = next;
    fastgen_switch_stack(from, next->stack_pointer);
  }

 private:
  void leave(void** from) {
    current = nullptr;
    fastgen_switch_stack(from, outside);
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

void Run::entry() {
  running->kernel();
  Fibre& fibre = *running->current;
  fibre.done = true;
  Block& block = *fibre.block;
  --block.running;
  --running->remaining;
  running->idle = 0;
  release_barrier(block);
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
  if (copy.from != nullptr) {
    memcpy(copy.to, copy.from, copy.bytes);
  } else {
    memset(copy.to, 0, copy.bytes);
  }
}
}  // namespace

// A copy arrives at once, over what others may still be reading, or as late as it may: drawn at random.
void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) running->fail("a misaligned copy, " + name(*running->current));
  const Copy copy{to, from, bytes};
  if (running->order() % 2 == 0) return arrive(copy);
  running->current->copies.push_back(copy);
}

void copy_async_commit() {
  Fibre& fibre = *running->current;
  fibre.groups.push_back(std::move(fibre.copies));
  fibre.copies.clear();
}

void copy_async_wait(int pending) {
  auto& groups = running->current->groups;
  while (groups.size() > size_t(pending)) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.pop_front();
  }
}

void run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared, bool cooperative) {
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
  ++launches;
  Run state(kernel, grid, block, shared);
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
__attribute__((visibility("default"))) void fastgen_emulated_device(int multiprocessors, int64_t shared_limit) {
  fastgen::emulator::device_multiprocessors = multiprocessors;
  fastgen::emulator::device_shared_limit = size_t(shared_limit);
}
}
