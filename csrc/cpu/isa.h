// Which instruction sets this CPU and its operating system offer, and the kernels chosen for them.
#pragma once

#include "kernel_table.h"

namespace fastgen {

// The active kernels: the best the CPU can run, unless select_isa said otherwise.
const KernelTable& kernels();

// Names compiled into this library, best first, and whether this machine can run one.
const char* isa_name(int i);  // null past the end
bool isa_usable(const char* name);

// Makes `name` active; false, and no change, if it is not compiled in or this machine cannot run it.
bool select_isa(const char* name);

// As the CPU gives it, "GenuineIntel" or "AuthenticAMD"; empty where there is none.
const char* cpu_vendor();

}  // namespace fastgen
