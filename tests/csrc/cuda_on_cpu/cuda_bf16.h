// CUDA's bfloat16 on the CPU, as far as the kernels of csrc/ use it.
#pragma once

#include "small_floats.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(cuda_on_cpu::SmallFloat<7>::value(x.bits)); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 y;
  y.bits = cuda_on_cpu::SmallFloat<7>::bits(x);
  return y;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
