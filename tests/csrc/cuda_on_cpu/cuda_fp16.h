// CUDA's half on the CPU, as far as the kernels of csrc/ use it.
#pragma once

#include "small_floats.h"

struct __half {
  unsigned short bits;
};

inline float __half2float(__half x) { return static_cast<float>(cuda_on_cpu::SmallFloat<10>::value(x.bits)); }
inline __half __float2half_rn(float x) {
  __half y;
  y.bits = cuda_on_cpu::SmallFloat<10>::bits(x);
  return y;
}
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
