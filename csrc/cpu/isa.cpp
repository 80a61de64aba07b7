#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(FASTGEN_X86)
#include <cpuid.h>
#endif

namespace fastgen {
namespace {

bool has_avx2 = false, has_avx512 = false, has_avx512_bf16 = false;

#if defined(FASTGEN_X86)
// Register state the operating system saves on a context switch (XCR0).
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

void detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return;
  const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1, fma = c >> 12 & 1;
  if (!osxsave || !avx) return;
  const uint64_t state = saved_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  has_avx2 = ymm && f16c && fma && (b >> 5 & 1);
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  has_avx512 = has_avx2 && zmm && f && dq && bw && vl;
  has_avx512_bf16 = has_avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

const KernelTable kAvx512Bf16Kernels = [] {
  KernelTable table = kAvx512Kernels;
  table.isa = "avx512_bf16";
  table.probe.multiply_adds_bf16 = multiply_adds_bf16;
  table.recurrent_sizes = recurrent_sizes_bf16;
  table.recurrent = recurrent_bf16;
  table.recurrent_backward_sizes = recurrent_backward_sizes_bf16;
  table.recurrent_backward = recurrent_backward_bf16;
  table.attention_sizes = attention_sizes_bf16;
  table.attention = attention_bf16;
  table.attention_backward_sizes = attention_backward_sizes_bf16;
  table.attention_backward = attention_backward_bf16;
  table.activation = activation_bf16;
  table.activation_backward = activation_backward_bf16;
  return table;
}();

const KernelTable* const kTables[] = {&kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2Kernels, &kGenericKernels};
#else
void detect() {}
const KernelTable* const kTables[] = {&kGenericKernels};
#endif

bool usable(const KernelTable* table) {
  if (strcmp(table->isa, "avx512_bf16") == 0) return has_avx512_bf16;
  if (strcmp(table->isa, "avx512") == 0) return has_avx512;
  if (strcmp(table->isa, "avx2") == 0) return has_avx2;
  return true;
}

const KernelTable* best() {
  detect();
  for (const KernelTable* table : kTables) {
    if (usable(table)) return table;
  }
  return &kGenericKernels;
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{best()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *active().load(std::memory_order_relaxed); }

const char* isa_name(int i) {
  constexpr int kCount = int(sizeof(kTables) / sizeof(kTables[0]));
  return i >= 0 && i < kCount ? kTables[i]->isa : nullptr;
}

bool isa_usable(const char* name) {
  kernels();
  for (const KernelTable* table : kTables) {
    if (strcmp(table->isa, name) == 0) return usable(table);
  }
  return false;
}

bool select_isa(const char* name) {
  if (!isa_usable(name)) return false;
  for (const KernelTable* table : kTables) {
    if (strcmp(table->isa, name) == 0) active().store(table, std::memory_order_relaxed);
  }
  return true;
}

const char* cpu_vendor() {
  static char name[13] = "";
#if defined(FASTGEN_X86)
  static const bool known = [] {
    uint32_t a, words[3];
    if (__get_cpuid(0, &a, &words[0], &words[2], &words[1])) memcpy(name, words, 12);
    return true;
  }();
  (void)known;
#endif
  return name;
}

}  // namespace fastgen
