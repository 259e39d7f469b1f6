// Floating-point numbers of 16 bits: to a double and back.
#pragma once

#include <cmath>

namespace cuda_on_cpu {

template <int kMantissa>  // its bits; the other 15 are the exponent's
struct SmallFloat {
  static constexpr int kBias = (1 << (14 - kMantissa)) - 1;
  static constexpr int kInfinity = 0x7fff >> kMantissa << kMantissa;

  // To the nearest, ties to even.
  static unsigned short bits(double x) {
    const int sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    if (x == 0) return static_cast<unsigned short>(sign);
    int exponent = std::isinf(x) ? kBias + 1 : std::ilogb(x);
    if (exponent > kBias) return static_cast<unsigned short>(sign | kInfinity);
    if (exponent < 1 - kBias) exponent = 1 - kBias;  // subnormal
    const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), kMantissa - exponent)));
    return static_cast<unsigned short>(sign |
                                       (((exponent + kBias - 1) << kMantissa) + units));  // a carry is right, too
  }

  static double value(unsigned short bits) {
    const int magnitude = bits & 0x7fff, exponent = magnitude >> kMantissa, units = magnitude & ((1 << kMantissa) - 1);
    const double x = magnitude > kInfinity    ? NAN
                     : magnitude == kInfinity ? INFINITY
                     : exponent == 0          ? std::ldexp(units, 1 - kBias - kMantissa)
                                              : std::ldexp(units | (1 << kMantissa), exponent - kBias - kMantissa);
    return bits & 0x8000 ? -x : x;
  }
};

}  // namespace cuda_on_cpu
