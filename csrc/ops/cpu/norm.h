// The length of a row of any floating type, also where the sum of squares leaves the range of a float.
#pragma once

#include <cmath>
#include <cstdint>

#include "number.h"

namespace fastssl::cpu {

// To be inlined where code is compiled for several instruction sets.
template <typename T>
[[gnu::always_inline]] inline float norm_of(const T* x, int64_t n) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += to_float(x[i]) * to_float(x[i]);
  if (squares > 1e-30f && squares < 1e30f) return std::sqrt(squares);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(to_float(x[i])) * to_float(x[i]);
  return static_cast<float>(std::sqrt(sum));
}

}  // namespace fastssl::cpu
