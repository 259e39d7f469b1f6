// Plain loops that the compiler turns into vector code, once for each instruction set.
#include "rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "exp2.h"
#include "norm.h"
#include "vectorised.h"

namespace fastssl::cpu {
namespace {

// 2^x; 0 below 2^−126 and for −∞, NaN for NaN. x must lie below 127.5.
[[gnu::always_inline]] inline float exp2(float x) {
  const float clamped = x < kLowest ? kLowest : x;
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);  // −½…½
  float p = kExp2[0];
  for (int i = 1; i < 7; ++i) p = p * f + kExp2[i];
  const float power = std::bit_cast<float>((std::bit_cast<int32_t>(shifted) + 127) << 23);
  return x < kLowest ? 0.f : p * power;
}

FASTSSL_VECTORISED float max(const float* x, int64_t n) {
  float result = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

FASTSSL_VECTORISED float exp2_sum(float* x, int64_t n, float shift) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    x[i] = exp2(x[i] - shift);
    sum += x[i];
  }
  return sum;
}

}  // namespace

FASTSSL_VECTORISED float norm(const float* x, int64_t n) { return norm_of(x, n); }

FASTSSL_VECTORISED float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

float absorb(float* logits, int64_t n, float& maximum, float& sum) {
  const float now = std::max(maximum, max(logits, n));
  const float shift = now == -std::numeric_limits<float>::infinity() ? 0.f : now;  // −∞ − (−∞) is no number
  const float rescale = maximum == now ? 1.f : std::exp2(maximum - shift);
  sum = sum * rescale + exp2_sum(logits, n, shift);
  maximum = now;
  return rescale;
}

FASTSSL_VECTORISED void scale_(float* x, float factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

FASTSSL_VECTORISED void axpy_(float* y, float a, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

FASTSSL_VECTORISED void interleave_rows(const Pair* rows, int64_t stride, int64_t count, int64_t columns, Pair* pairs) {
  for (int64_t r = 0; r < count; r += 2) {
    const Pair* const even = rows + r * stride;
    const Pair* const odd = even + stride;
    Pair* const out = pairs + r / 2 * columns;
    const bool alone = r + 1 == count;
    for (int64_t c = 0; c < columns; ++c) {
      const uint32_t low = even[c / 2] >> c % 2 * 16 & 0xffffu;
      const uint32_t high = alone ? 0 : odd[c / 2] >> c % 2 * 16;
      out[c] = low | high << 16;
    }
  }
}

Length length(const float* x, int64_t n) {
  const float l = norm(x, n);
  return {1.f / std::max(l, kEps), l > kEps};
}

void backward_of_normalize_(float* g, const float* unit, Length length, int64_t n) {
  if (length.regular) axpy_(g, -dot(g, unit, n), unit, n);
  scale_(g, length.inverse, n);
}

}  // namespace fastssl::cpu
