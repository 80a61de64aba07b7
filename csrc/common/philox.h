// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A block's four 32-bit words stand in the low halves of four 64-bit lanes. The widening multiply reads
// only low halves, so whatever the exclusive-ors leave in the high halves never has to be masked off.
// U64 is uint64_t (CUDA) or a vector of them, one block a lane.
#pragma once

#include "platform.h"

namespace fastgen {

struct PhiloxKey {
  uint32_t round[10][2];

  FASTGEN_MEMBER explicit PhiloxKey(uint64_t seed) {
    uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
    for (int i = 0; i < 10; ++i) {
      round[i][0] = low;
      round[i][1] = high;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
  }
};

FASTGEN_FN uint64_t mul32(uint64_t a, uint64_t b) { return uint64_t(uint32_t(a)) * uint32_t(b); }
FASTGEN_FN uint64_t xor3(uint64_t a, uint64_t b, uint64_t c) { return a ^ b ^ c; }

// Ten rounds in place on N counters c0 .. c3; the words of the result are the low halves. A counter is one
// long chain of dependent operations: several at once fill the gaps of each other and share the round keys.
template <int N, class U64>
FASTGEN_FN void philox4x32_10(U64 (&c0)[N], U64 (&c1)[N], U64 (&c2)[N], U64 (&c3)[N], const PhiloxKey& key) {
  const U64 m0(0xD2511F53ull), m1(0xCD9E8D57ull);
  FASTGEN_UNROLL
  for (int i = 0; i < 10; ++i) {
    const U64 k0(uint64_t(key.round[i][0])), k1(uint64_t(key.round[i][1]));
    FASTGEN_UNROLL
    for (int n = 0; n < N; ++n) {
      const U64 p0 = mul32(c0[n], m0), p1 = mul32(c2[n], m1);
      c0[n] = xor3(p1 >> 32, c1[n], k0);
      c1[n] = p1;
      c2[n] = xor3(p0 >> 32, c3[n], k1);
      c3[n] = p0;
    }
  }
}

// The counter of a stream: (block low, block high, 0, width), see fastgen/reference/random.py.
constexpr uint64_t kWidth32 = 0, kWidth64 = 1;

}  // namespace fastgen
