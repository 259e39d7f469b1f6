// The inner loops of the augmentation: what is done to pixels one by one, and weighted sums of pixels for the blur.
//
// A pixel is three values that lie side by side: red, green, blue. They are whole numbers of 0…255, as bytes in memory
// and as floats in registers, and cut off behind the point where a change makes them other ones. Everything exists once
// for each instruction set; `pixels()` picks the processor's.
#pragma once

#include <cstdint>

#include "../ema_segment.h"

namespace fastssl::cpu {

enum class Change : std::uint8_t {
  kBlend,     // x ← x·a + b, within 0…255
  kSaturate,  // x ← x·a + luma·b, within 0…255
  kTurn,      // the hue by a sixths of a circle, -3…3
  kGray,      // x ← luma
  kSolarize,  // x ← 255 - x where x ≥ a
  kErase,     // x ← 0
};

struct ChangeOf {
  Change change;
  float a = 0, b = 0;
};

// What is done to every pixel, in this order.
struct Chain {
  static constexpr int kLongest = 8;
  ChangeOf changes[kLongest];
  int length = 0;
};

// A value of channel c is written as x·scale[c] + offset[c].
struct Affine {
  float scale[3], offset[3];
};

struct Pixels {
  // Reads pixels, changes them, and writes them as kFloat, kHalf or kBFloat16, or with scale 1 and offset 0 as kBytes.
  void (*convert)(const Chain& chain, const Affine& affine, const uint8_t* from, void* to, ops::Type to_type,
                  int64_t count);

  // The sum of the lumas of pixels after their changes.
  double (*luma)(const Chain& chain, const uint8_t* from, int64_t count);

  // to[i] ← Σ taps[t]·from[t][i], rounded, for i in begin…end.
  void (*sum_lines)(const float* const* from, const float* taps, int64_t count, int64_t begin, int64_t end,
                    uint8_t* to);

  // to[i] ← Σ taps[t]·from[i + 3t] for i in 0…length, and writes up to kPadding floats more.
  void (*slide)(const float* from, const float* taps, int64_t count, int64_t length, float* to);

  // Pixels that have weights of their own: to[i] ← Σ weights[t·stride + i]·from[3t + i%3] for i in 0…length, and writes
  // up to kPadding floats more. The stride is a multiple of kSpread.
  void (*spread)(const float* from, const float* weights, int64_t stride, int64_t count, int64_t length, float* to);
};

constexpr int64_t kPadding = 128;  // floats, of the longest piece that is computed at once
constexpr int64_t kSpread = 48;    // floats, of three vectors: whole pixels

const Pixels& pixels();

}  // namespace fastssl::cpu
