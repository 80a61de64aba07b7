// Fresh memory for large results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgen {

// Asks for huge pages under a result that is about to be written for the first time. Page faults on 4 KB
// pages otherwise cost several times the kernel (64 MB: 36 ms against 7.5 ms to touch it, on a virtual
// machine of two cores). It is only advice: where it is refused, nothing changes. The advice stays with
// the address range, so later tensors there have huge pages as well. FASTGEN_HUGE_PAGES=0 turns it off.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  static const char* const choice = std::getenv("FASTGEN_HUGE_PAGES");
  if (bytes < 2 * kHuge || (choice != nullptr && std::strcmp(choice, "0") == 0)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fastgen
