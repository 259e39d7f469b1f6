// Elements of the four floating types as float or double and back, in plain arithmetic that the compiler vectorises.
#pragma once

#include <bit>
#include <cstdint>

namespace fastssl::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

[[gnu::always_inline]] inline double to_float(double x) { return x; }
[[gnu::always_inline]] inline float to_float(float x) { return x; }
[[gnu::always_inline]] inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// A normal number's exponent is moved by a multiplication; a subnormal one is the difference of two normal ones.
[[gnu::always_inline]] inline float to_float(Half x) {
  const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16, rest = uint32_t{x.bits} << 17;
  const float normal = std::bit_cast<float>((rest >> 4) + 0x70000000u) * 0x1p-112f;
  const float subnormal = std::bit_cast<float>((rest >> 17) | 0x3f000000u) - 0.5f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(rest < 0x08000000u ? subnormal : normal));
}

template <typename T>
T from_float(float x);

template <>
[[gnu::always_inline]] inline float from_float(float x) {
  return x;
}

template <>
[[gnu::always_inline]] inline BFloat16 from_float(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

// Adding a power of two that has the result's last digit as its own rounds to it, for subnormal results too.
template <>
[[gnu::always_inline]] inline Half from_float(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, twice = bits << 1;
  const float scaled = std::bit_cast<float>(bits & 0x7fffffffu) * 0x1p112f * 0x1p-110f;  // ∞ from 65,520 on
  const uint32_t exponent = twice & 0xff000000u, bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t magnitude = (sum >> 13 & 0x7c00u) + (sum & 0x0fffu);
  return {static_cast<uint16_t>(sign | (twice > 0xff000000u ? 0x7e00u : magnitude))};
}

}  // namespace fastssl::cpu
