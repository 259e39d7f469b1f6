// The loops of panel.h for one instruction set; CMake compiles this file once for each, with FASTSSL_ISA as its name.
//
// Nothing from the standard library is used but its types: a function that the linker could share with code for an
// older processor must not be compiled here.
#include "exp2.h"
#include "panel.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fastssl::cpu {
namespace {

// A register is kLanes floats; kRows×kColumns of them hold a piece of C, as many as hide the latency of an addition
// and leave registers for A and B.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kColumns = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kColumns = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 4, kColumns = 4;
#else
constexpr int kLanes = 4, kRows = 4, kColumns = 2;
#endif
constexpr int kVectors = kPanel / kLanes;

// Registers as they lie in memory: of any alignment, and allowed to alias floats.
using Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = float;
using Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = int32_t;
using Bits __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = uint32_t;

#define FASTSSL_INLINE [[gnu::always_inline]] static inline

FASTSSL_INLINE Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
FASTSSL_INLINE void store(float* x, const Floats& v) { *reinterpret_cast<Floats*>(x) = v; }

struct Single {
  using Element = float;
  using Vector = Floats;
  FASTSSL_INLINE void add_product(Floats& c, float a, const Floats& b) { c += a * b; }
};

struct Paired {
  using Element = Pair;
  using Vector = Bits;
  FASTSSL_INLINE void add_product(Floats& c, Pair a, const Bits& b) {
#ifdef __AVX512BF16__
    c = (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#else
    const Bits both = a - Bits{};
    c += (Floats)(both << 16) * (Floats)(b << 16);
    c += (Floats)(both & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
  }
};

// C's piece of R rows and kColumns registers.
template <typename Op, int R>
FASTSSL_INLINE void piece(const typename Op::Element* a, int64_t a_row, int64_t a_step, const typename Op::Element* b,
                          int64_t b_row, int64_t depth, bool add, float* c, int64_t c_row) {
  Floats sums[R][kColumns];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColumns; ++v) sums[r][v] = add ? load(c + r * c_row + v * kLanes) : Floats{};
  }
  for (int64_t t = 0; t < depth; ++t) {
    typename Op::Vector row[kColumns];
    for (int v = 0; v < kColumns; ++v) row[v] = reinterpret_cast<const typename Op::Vector*>(b + t * b_row)[v];
    for (int r = 0; r < R; ++r) {
      const typename Op::Element factor = a[r * a_row + t * a_step];
      for (int v = 0; v < kColumns; ++v) Op::add_product(sums[r][v], factor, row[v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColumns; ++v) store(c + r * c_row + v * kLanes, sums[r][v]);
  }
}

template <typename Op>
void multiply(const typename Op::Element* a, int64_t a_row, int64_t a_step, const typename Op::Element* b,
              int64_t b_row, int64_t rows, int64_t depth, bool add, float* c, int64_t c_row) {
  for (int64_t x = 0; x < kPanel; x += kColumns * kLanes) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      piece<Op, kRows>(a + r * a_row, a_row, a_step, b + x, b_row, depth, add, c + r * c_row + x, c_row);
    }
    for (; r < rows; ++r) {
      piece<Op, 1>(a + r * a_row, a_row, a_step, b + x, b_row, depth, add, c + r * c_row + x, c_row);
    }
  }
}

FASTSSL_INLINE Floats larger(const Floats& a, const Floats& b) { return a > b ? a : b; }

// 2^x; 0 below 2^−126 and for −∞, NaN for NaN. x must lie below 127.5.
FASTSSL_INLINE Floats exp2(const Floats& x) {
  const Floats lowest = Floats{} + kLowest;
  const Floats clamped = x < lowest ? lowest : x;
  const Floats shifted = clamped + kRound;
  const Floats f = clamped - (shifted - kRound);  // −½…½
  Floats p = Floats{} + kExp2[0];
  for (int i = 1; i < 7; ++i) p = p * f + kExp2[i];
  const Floats power = (Floats)(((Ints)shifted + 127) << 23);
  return x < lowest ? Floats{} : p * power;
}

// The nearest bfloat16, ties to even, in the upper half.
FASTSSL_INLINE Bits rounded(const Floats& x) {
  const Bits bits = (Bits)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// What `absorb` and `absorb_pairs` share, for one register of queries.
FASTSSL_INLINE bool running(const Floats& tile_maximum, float* maximum, float* rescale, Floats& shift) {
  constexpr float kInf = __builtin_inff();
  const Floats old = load(maximum), now = larger(tile_maximum, old);
  shift = now == -kInf ? Floats{} : now;  // −∞ − (−∞) is no number
  const Floats factor = old == now ? Floats{} + 1.f : exp2(old - shift);
  store(maximum, now);
  store(rescale, factor);
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= factor[i] != 1.f;
  return any;
}

bool absorb(float* logits, int64_t rows, float* maximum, float* sum, float* rescale) {
  bool any = false;
  for (int64_t x = 0; x < kPanel; x += kLanes) {
    Floats tile_maximum = Floats{} - __builtin_inff(), shift;
    for (int64_t j = 0; j < rows; ++j) tile_maximum = larger(load(logits + j * kPanel + x), tile_maximum);
    any |= running(tile_maximum, maximum + x, rescale + x, shift);
    Floats total = load(sum + x) * load(rescale + x);
    for (int64_t j = 0; j < rows; ++j) {
      const Floats weight = exp2(load(logits + j * kPanel + x) - shift);
      store(logits + j * kPanel + x, weight);
      total += weight;
    }
    store(sum + x, total);
  }
  return any;
}

bool absorb_pairs(float* products, int64_t rows, const float* query_scale, const float* key_scale, float* maximum,
                  float* sum, float* rescale, Pair* weights) {
  bool any = false;
  for (int64_t x = 0; x < kPanel; x += kLanes) {
    const Floats scale = load(query_scale + x);
    Floats tile_maximum = Floats{} - __builtin_inff(), shift;
    for (int64_t j = 0; j < rows; ++j) {
      const Floats logit = load(products + j * kPanel + x) * key_scale[j] * scale;
      store(products + j * kPanel + x, logit);
      tile_maximum = larger(logit, tile_maximum);
    }
    any |= running(tile_maximum, maximum + x, rescale + x, shift);
    Floats total = load(sum + x) * load(rescale + x);
    for (int64_t j = 0; j < rows; j += 2) {
      const bool two = j + 1 < rows;
      const Floats even = exp2(load(products + j * kPanel + x) - shift);
      const Floats odd = two ? exp2(load(products + (j + 1) * kPanel + x) - shift) : Floats{};
      total += even + odd;
      *reinterpret_cast<Bits*>(weights + j / 2 * kPanel + x) =
          (rounded(even * key_scale[j]) >> 16) | (rounded(odd * (two ? key_scale[j + 1] : 0.f)) & 0xffff0000u);
    }
    store(sum + x, total);
  }
  return any;
}

void weigh(float* logits, int64_t rows, const float* shift, const float* weight) {
  for (int64_t x = 0; x < kPanel; x += kLanes) {
    const Floats s = load(shift + x), w = load(weight + x);
    for (int64_t j = 0; j < rows; ++j) store(logits + j * kPanel + x, exp2(load(logits + j * kPanel + x) - s) * w);
  }
}

void scale(float* c, int64_t rows, const float* factor) {
  for (int64_t x = 0; x < kPanel; x += kLanes) {
    const Floats f = load(factor + x);
    for (int64_t r = 0; r < rows; ++r) store(c + r * kPanel + x, load(c + r * kPanel + x) * f);
  }
}

}  // namespace

#define FASTSSL_STRING(x) #x
#define FASTSSL_NAME(x) FASTSSL_STRING(x)
extern const Panel FASTSSL_ISA;
const Panel FASTSSL_ISA = {
    multiply<Single>, multiply<Paired>, absorb, absorb_pairs, weigh, scale, FASTSSL_NAME(FASTSSL_ISA),
};

}  // namespace fastssl::cpu
