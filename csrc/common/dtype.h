// Element types of tensors, and the scalar conversions of the half types.
#pragma once

#include "platform.h"

namespace fastgen {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kBool, kInt32, kInt64 };

// Storage of the half types: distinct types for the same 16 bits, computed on as float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that elements are computed in.
template <class Storage>
struct WorkType {
  using T = float;
};
template <>
struct WorkType<double> {
  using T = double;
};

FASTGEN_FN uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTGEN_FN float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FASTGEN_FN float widen(float x) { return x; }
FASTGEN_FN double widen(double x) { return x; }
FASTGEN_FN float widen(bool x) { return x ? 1.0f : 0.0f; }
FASTGEN_FN float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

FASTGEN_FN float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf, nan
    return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u));
  }
  // A subnormal half goes by way of an integer: a thread that flushes subnormal floats must not lose it.
  const uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400u ? subnormal : (magnitude << 13) + 0x38000000u));  // bias 15 to 127
#endif
}

// Rounding is to nearest, ties to even; NaN stays NaN.
FASTGEN_FN void narrow(float x, float* out) { *out = x; }
FASTGEN_FN void narrow(double x, double* out) { *out = x; }
FASTGEN_FN void narrow(float x, double* out) { *out = x; }
FASTGEN_FN void narrow(float x, bool* out) { *out = x != 0.0f; }

FASTGEN_FN void narrow(float x, BFloat16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = bits_of(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = is_nan ? uint16_t(bits >> 16 | 0x40u) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

FASTGEN_FN void narrow(float x, Float16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds past the largest half, 65504
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds at the subnormal spacing, 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
#endif
}

}  // namespace fastgen
