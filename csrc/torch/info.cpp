// What fastgen/_load.py asks of the library, by ctypes: which kernels it holds and which are active.
#include "../cpu/isa.h"

#define FASTGEN_EXPORT extern "C" __attribute__((visibility("default")))

FASTGEN_EXPORT const char* fastgen_isa_active() { return fastgen::kernels().isa; }
// The i-th instruction set compiled in, best first; null past the last.
FASTGEN_EXPORT const char* fastgen_isa_name(int i) { return fastgen::isa_name(i); }
FASTGEN_EXPORT int fastgen_isa_usable(const char* name) { return fastgen::isa_usable(name); }
FASTGEN_EXPORT int fastgen_isa_select(const char* name) { return fastgen::select_isa(name); }
