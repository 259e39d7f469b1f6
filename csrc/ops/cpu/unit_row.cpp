// Two passes over a row that lies in the first-level cache, without a copy of it in float.
#include "unit_row.h"

#include <algorithm>

#include "norm.h"
#include "number.h"
#include "rows.h"
#include "vectorised.h"

namespace fastssl::cpu {
namespace {

using ops::Type;

template <typename From, typename To>
[[gnu::always_inline]] inline void write(void* to, const From* from, float scale, int64_t count) {
  To* const out = static_cast<To*>(to);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<To>(scale * to_float(from[i]));
}

template <typename From>
[[gnu::always_inline]] inline void convert(void* to, Type to_type, const void* from, int64_t count) {
  const From* const row = static_cast<const From*>(from);
  const float scale = 1.f / std::max(norm_of(row, count), kEps);
  if (to_type == Type::kHalf) {
    write<From, Half>(to, row, scale, count);
  } else if (to_type == Type::kBFloat16) {
    write<From, BFloat16>(to, row, scale, count);
  } else {
    write<From, float>(to, row, scale, count);
  }
}

}  // namespace

FASTSSL_VECTORISED void write_unit_row(void* to, Type to_type, const void* from, Type from_type, int64_t count) {
  if (from_type == Type::kHalf) {
    convert<Half>(to, to_type, from, count);
  } else if (from_type == Type::kBFloat16) {
    convert<BFloat16>(to, to_type, from, count);
  } else {
    convert<float>(to, to_type, from, count);
  }
}

}  // namespace fastssl::cpu
