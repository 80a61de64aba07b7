// The names of csrc/cuda/warpgroup.h on the emulated device (emulator.cpp).
#pragma once

#include <array>
#include <initializer_list>

#include "emulated_device.h"

namespace fastgen {
namespace emulator {

void init_arrivals(uint64_t* barrier, int arrivals);
void arrive(uint64_t* barrier);
void wait_arrivals(uint64_t* barrier, uint32_t parity);
void named_barrier(int number, int threads, bool wait);
bool named_barrier_any(int number, int threads, bool value);
void set_registers(int registers, bool more);
void fence_shared();

// What a thread gives to a product of its warpgroup.
struct Product {
  float* d;  // [columns / 8][4]
  const uint32_t* a;
  uint64_t b;
  bool rows, add;
  int columns;
  float (*widen)(uint16_t);
};
// What a thread names of its registers: sums, or left sides.
struct Registers {
  const void* first;
  size_t bytes;
};
void warpgroup_fence(std::initializer_list<Registers> registers);
void warpgroup_multiply_add(const Product& product);
void warpgroup_commit();
void warpgroup_wait(int pending, std::initializer_list<Registers> registers);

}  // namespace emulator

inline void init_arrivals(uint64_t* barrier, int arrivals) { emulator::init_arrivals(barrier, arrivals); }
inline void arrive(uint64_t* barrier) { emulator::arrive(barrier); }
inline void wait_arrivals(uint64_t* barrier, uint32_t parity) { emulator::wait_arrivals(barrier, parity); }
inline void named_barrier_wait(int number, int threads) { emulator::named_barrier(number, threads, true); }
inline void named_barrier_arrive(int number, int threads) { emulator::named_barrier(number, threads, false); }
inline bool named_barrier_any(int number, int threads, bool value) {
  return emulator::named_barrier_any(number, threads, value);
}
inline int lane_now() { return emulator::lane(); }
template <int kRegisters>
[[gnu::always_inline]] inline void lower_registers() {
  emulator::set_registers(kRegisters, false);
}
template <int kRegisters>
[[gnu::always_inline]] inline void raise_registers() {
  emulator::set_registers(kRegisters, true);
}

inline void fence_shared() { emulator::fence_shared(); }
// Inlined, so that where the emulator's functions return to tells one place of a kernel from another.
[[gnu::always_inline]] inline void warpgroup_commit() { emulator::warpgroup_commit(); }
template <class... Registers>
[[gnu::always_inline]] inline void warpgroup_fence(Registers&... registers) {
  emulator::warpgroup_fence({emulator::Registers{&registers, sizeof registers}...});
}
template <int kPending, class... Registers>
[[gnu::always_inline]] inline void warpgroup_wait(Registers&... registers) {
  emulator::warpgroup_wait(kPending, {emulator::Registers{&registers, sizeof registers}...});
}
template <class Half, bool kRows, int kCount>
[[gnu::always_inline]] inline void warpgroup_multiply_add(float (&d)[kCount][4], const uint32_t (&a)[4], uint64_t b,
                                                          bool add) {
  emulator::warpgroup_multiply_add(
      {&d[0][0], a, b, kRows, add, 8 * kCount, [](uint16_t bits) { return widen(Half{bits}); }});
}

}  // namespace fastgen
