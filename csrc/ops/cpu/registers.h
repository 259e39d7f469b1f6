// A vector register of floats in the words of the compiler's vectors, and by intrinsics what it does badly with those.
// For files that are compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "number.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastssl::cpu {
namespace {  // not the same thing in every file

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Registers as they lie in memory: of any alignment, and allowed to alias what is there.
using Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = float;
using Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = int32_t;
using Bits __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = uint32_t;
using Shorts __attribute__((vector_size(2 * kLanes), aligned(2), may_alias)) = uint16_t;
using Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias)) = uint8_t;

#define FASTSSL_INLINE [[gnu::always_inline, maybe_unused]] static inline

FASTSSL_INLINE Floats all(float x) { return x - Floats{}; }  // 0 + x would be an addition
FASTSSL_INLINE Floats magnitude(const Floats& x) { return (Floats)((Bits)x & 0x7fffffffu); }
FASTSSL_INLINE Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
FASTSSL_INLINE void store(float* x, const Floats& v) { *reinterpret_cast<Floats*>(x) = v; }

FASTSSL_INLINE void store(BFloat16* x, const Floats& v) {
  const Bits bits = (Bits)v, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
  *reinterpret_cast<Shorts*>(x) = __builtin_convertvector(v != v ? Bits{} + 0x7fc0u : rounded, Shorts);
}

// a·b + c, rounded once where the processor can.
FASTSSL_INLINE Floats fused(const Floats& a, const Floats& b, const Floats& c);

// The second operand where one is no number.
FASTSSL_INLINE Floats larger(const Floats& a, const Floats& b);
FASTSSL_INLINE Floats smaller(const Floats& a, const Floats& b);

// Without what is behind the point.
FASTSSL_INLINE Floats cut(const Floats& x);

// Bytes as they are, and numbers of 0…255 cut off behind the point.
FASTSSL_INLINE Floats load(const uint8_t* x);
FASTSSL_INLINE void store(uint8_t* x, const Floats& v);

FASTSSL_INLINE void store(Half* x, const Floats& v);

#if defined(__AVX512F__)

constexpr __mmask16 kAll = 0xffff;  // GCC's own headers warn about the intrinsics without a mask

FASTSSL_INLINE Floats fused(const Floats& a, const Floats& b, const Floats& c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTSSL_INLINE Floats larger(const Floats& a, const Floats& b) {
  return (Floats)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b);
}
FASTSSL_INLINE Floats smaller(const Floats& a, const Floats& b) {
  return (Floats)_mm512_maskz_min_ps(kAll, (__m512)a, (__m512)b);
}
FASTSSL_INLINE Floats cut(const Floats& x) {
  return (Floats)_mm512_maskz_roundscale_ps(kAll, (__m512)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}
FASTSSL_INLINE Floats load(const uint8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return (Floats)_mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes));
}
FASTSSL_INLINE void store(uint8_t* x, const Floats& v) {
  const __m512i ints = _mm512_maskz_cvttps_epi32(kAll, (__m512)v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_maskz_cvtepi32_epi8(kAll, ints));
}
FASTSSL_INLINE void store(Half* x, const Floats& v) {
  const __m256i halves = _mm512_maskz_cvtps_ph(kAll, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), halves);
}

#elif defined(__AVX2__)

FASTSSL_INLINE Floats fused(const Floats& a, const Floats& b, const Floats& c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTSSL_INLINE Floats larger(const Floats& a, const Floats& b) {
  return (Floats)__builtin_ia32_maxps256((__m256)a, (__m256)b);
}
FASTSSL_INLINE Floats smaller(const Floats& a, const Floats& b) {
  return (Floats)__builtin_ia32_minps256((__m256)a, (__m256)b);
}
FASTSSL_INLINE Floats cut(const Floats& x) {
  return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}
FASTSSL_INLINE Floats load(const uint8_t* x) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
FASTSSL_INLINE void store(uint8_t* x, const Floats& v) {
  const __m256i ints = _mm256_cvttps_epi32((__m256)v);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm_packus_epi16(shorts, shorts));
}
FASTSSL_INLINE void store(Half* x, const Floats& v) {
  const __m128i halves = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), halves);
}

#else

FASTSSL_INLINE Floats cut(const Floats& x) { return __builtin_convertvector(__builtin_convertvector(x, Ints), Floats); }
FASTSSL_INLINE void store(Half* x, const Floats& v) {
  for (int i = 0; i < kLanes; ++i) x[i] = from_float<Half>(v[i]);
}

#if defined(__x86_64__)
FASTSSL_INLINE Floats fused(const Floats& a, const Floats& b, const Floats& c) { return a * b + c; }
FASTSSL_INLINE Floats larger(const Floats& a, const Floats& b) {
  return (Floats)__builtin_ia32_maxps((__m128)a, (__m128)b);
}
FASTSSL_INLINE Floats smaller(const Floats& a, const Floats& b) {
  return (Floats)__builtin_ia32_minps((__m128)a, (__m128)b);
}
FASTSSL_INLINE Floats load(const uint8_t* x) {
  int32_t bytes = 0;
  __builtin_memcpy(&bytes, x, sizeof(bytes));
  const __m128i zero = _mm_setzero_si128(), shorts = _mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), zero);
  return (Floats)_mm_cvtepi32_ps(_mm_unpacklo_epi16(shorts, zero));
}
FASTSSL_INLINE void store(uint8_t* x, const Floats& v) {
  const __m128i shorts = _mm_packs_epi32(_mm_cvttps_epi32((__m128)v), _mm_setzero_si128());
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
  __builtin_memcpy(x, &bytes, sizeof(bytes));
}
#else
FASTSSL_INLINE Floats fused(const Floats& a, const Floats& b, const Floats& c) {
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
}
FASTSSL_INLINE Floats larger(const Floats& a, const Floats& b) { return a > b ? a : b; }
FASTSSL_INLINE Floats smaller(const Floats& a, const Floats& b) { return a < b ? a : b; }
FASTSSL_INLINE Floats load(const uint8_t* x) {
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(x), Floats);
}
FASTSSL_INLINE void store(uint8_t* x, const Floats& v) {
  *reinterpret_cast<Bytes*>(x) = __builtin_convertvector(__builtin_convertvector(v, Ints), Bytes);
}
#endif

#endif

}  // namespace
}  // namespace fastssl::cpu
