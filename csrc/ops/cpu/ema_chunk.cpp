// Compiled for several instruction sets; one pass reads target and source and writes target and shadow.
#include "ema_chunk.h"

#include <cstring>

#include "number.h"
#include "vectorised.h"

namespace fastssl::cpu {
namespace {

using ops::Segment;
using ops::Type;

template <typename T, typename S, typename Shadow, typename Mix>
[[gnu::always_inline]] inline void each(T* __restrict__ target, const S* __restrict__ source,
                                        Shadow* __restrict__ shadow, int64_t count, const Mix& mix) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T updated = mix(target[i], static_cast<T>(to_float(source[i])));
    target[i] = updated;
    if constexpr (sizeof(Shadow) == 2) shadow[i] = from_float<Shadow>(static_cast<float>(updated));
  }
}

// w = 1−m. Like torch.lerp, from the nearer end, so that equal values stay equal; m = 1 changes nothing and m = 0
// copies whatever the other side is, NaN and infinity too.
template <typename T, typename S, typename Shadow>
[[gnu::always_inline]] inline void lerp(T* target, const S* source, Shadow* shadow, int64_t count, T m, T w) {
  if (w == T{0}) {
    each(target, source, shadow, count, [](T t, T) { return t; });
  } else if (m == T{0}) {
    each(target, source, shadow, count, [](T, T s) { return s; });
  } else if (w < T{0.5}) {
    each(target, source, shadow, count, [w](T t, T s) { return w * (s - t) + t; });
  } else {
    each(target, source, shadow, count, [m](T t, T s) { return m * (t - s) + s; });
  }
}

template <typename T, typename S>
[[gnu::always_inline]] inline void with_shadow(const Segment& x, int64_t begin, int64_t end, double m) {
  T* const target = static_cast<T*>(x.target) + begin;
  const S* const source = static_cast<const S*>(x.source) + begin;
  const T momentum = static_cast<T>(m), rest = static_cast<T>(1 - m);
  if (x.shadow_type == Type::kHalf) {
    lerp(target, source, static_cast<Half*>(x.shadow) + begin, end - begin, momentum, rest);
  } else if (x.shadow_type == Type::kBFloat16) {
    lerp(target, source, static_cast<BFloat16*>(x.shadow) + begin, end - begin, momentum, rest);
  } else {
    lerp<T, S, char>(target, source, nullptr, end - begin, momentum, rest);
  }
}

template <typename T>
[[gnu::always_inline]] inline void with_source(const Segment& x, int64_t begin, int64_t end, double m) {
  switch (x.source_type) {
    case Type::kDouble:
      return with_shadow<T, double>(x, begin, end, m);
    case Type::kHalf:
      return with_shadow<T, Half>(x, begin, end, m);
    case Type::kBFloat16:
      return with_shadow<T, BFloat16>(x, begin, end, m);
    default:
      return with_shadow<T, float>(x, begin, end, m);
  }
}

}  // namespace

FASTSSL_VECTORISED void ema_chunk(const Segment& x, int64_t begin, int64_t end, double m) {
  if (x.target_type == Type::kFloat) {
    with_source<float>(x, begin, end, m);
  } else if (x.target_type == Type::kDouble) {
    with_source<double>(x, begin, end, m);
  } else {
    std::memcpy(static_cast<char*>(x.target) + begin, static_cast<const char*>(x.source) + begin, end - begin);
    if (x.shadow) std::memcpy(static_cast<char*>(x.shadow) + begin, static_cast<char*>(x.target) + begin, end - begin);
  }
}

}  // namespace fastssl::cpu
