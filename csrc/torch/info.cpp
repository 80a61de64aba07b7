// What Python asks of the library by ctypes: which kernels it holds and which are active (fastgen/_load.py), and what
// a core can do with them at best (fastgen/benchmark/bounds.py).
#include <cstdint>

#include "../cpu/isa.h"

#define FASTGEN_EXPORT extern "C" __attribute__((visibility("default")))

FASTGEN_EXPORT const char* fastgen_isa_active() { return fastgen::kernels().isa; }
// The i-th instruction set compiled in, best first; null past the last.
FASTGEN_EXPORT const char* fastgen_isa_name(int i) { return fastgen::isa_name(i); }
FASTGEN_EXPORT int fastgen_isa_usable(const char* name) { return fastgen::isa_usable(name); }
FASTGEN_EXPORT int fastgen_isa_select(const char* name) { return fastgen::select_isa(name); }
FASTGEN_EXPORT const char* fastgen_cpu_vendor() { return fastgen::cpu_vendor(); }

FASTGEN_EXPORT double fastgen_probe_multiply_adds(int64_t count) {
  return fastgen::kernels().probe.multiply_adds(count);
}
FASTGEN_EXPORT double fastgen_probe_multiply_adds_double(int64_t count) {
  return fastgen::kernels().probe.multiply_adds_double(count);
}
FASTGEN_EXPORT double fastgen_probe_multiply_adds_bf16(int64_t count) {
  return fastgen::kernels().probe.multiply_adds_bf16(count);
}
FASTGEN_EXPORT double fastgen_probe_reads(const float* from, int64_t count, int64_t times) {
  return fastgen::kernels().probe.reads(from, count, times);
}
