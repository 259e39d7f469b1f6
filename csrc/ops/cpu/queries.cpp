// Normalises and packs queries.
#include "queries.h"

#include <ATen/ATen.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "work.h"

namespace fastssl::cpu {

using at::Tensor;
using c10::irange;

// Keys may be huge as well: products begin this many powers of two lower, and stay far above what is flushed to 0.
constexpr int kHeadroom = 30;

void check_rows(const Tensor& query, const Tensor& keys) {
  const auto dtype = query.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "query must be float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK(keys.scalar_type() == dtype || (dtype == at::kFloat && at::isReducedFloatingType(keys.scalar_type())),
              "keys must have the query's dtype ", dtype, ", or be of half precision with a float32 query, got ",
              keys.scalar_type());
  TORCH_CHECK(query.dim() == 2 && query.size(1) > 0, "query must be N×D with D > 0, got ", query.sizes());
  TORCH_CHECK(keys.dim() == 2 || (keys.dim() == 3 && keys.size(0) == query.size(0)), "keys must be M×D or N×M×D, got ",
              keys.sizes());
  TORCH_CHECK(keys.size(-1) == query.size(1), "keys must have ", query.size(1), " components, got ", keys.sizes());
}

UnitRows::UnitRows(const Tensor& x)
    : n(x.size(0)),
      d(x.size(1)),
      stride(divide_up(d, kPanel) * kPanel),
      unit(at::zeros({divide_up(n, kPanel) * kPanel, stride}, at::kFloat)),
      lengths(n) {
  unit.narrow(0, 0, n).narrow(1, 0, d).copy_(x);
  parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (const auto i : irange(begin, end)) {
      lengths[i] = length(row(i), d);
      scale_(row(i), lengths[i].inverse, d);
    }
  });
}

Queries::Queries(const UnitRows& query, float factor) : panels(divide_up(query.n, kPanel)), d(query.d) {
  columns = at::zeros({panels, d, kPanel}, at::kFloat);
  parallel_for(0, query.n, kPanel, [&](int64_t begin, int64_t end) {
    for (const auto i : irange(begin, end)) {
      float* const column = data(columns) + i / kPanel * d * kPanel + i % kPanel;
      for (const auto c : irange(d)) column[c * kPanel] = query.row(i)[c] * factor;
    }
  });
}

QueryPairs::QueryPairs(const Tensor& query, const UnitRows& unit, float factor)
    : pairs(divide_up(unit.d, 2)),
      columns(divide_up(unit.n, kPanel) * pairs * kPanel, 0),
      scale(divide_up(unit.n, kPanel) * kPanel, 0.f) {
  const Tensor raw = query.to(at::kFloat).contiguous();
  parallel_for(0, unit.n, kPanel, [&](int64_t begin, int64_t end) {
    for (const auto i : irange(begin, end)) {
      const float* const row = raw.const_data_ptr<float>() + i * unit.d;
      float largest = 0;
      for (const auto c : irange(unit.d)) largest = std::max(largest, std::abs(row[c]));
      const int exponent = largest > 0 && std::isfinite(largest) ? std::ilogb(largest) + kHeadroom : 0;
      scale[i] = std::ldexp(unit.lengths[i].inverse, exponent) * factor;
      Pair* const column = columns.data() + i / kPanel * pairs * kPanel + i % kPanel;
      for (const auto c : irange(unit.d)) {
        column[c / 2 * kPanel] |= static_cast<Pair>(c10::BFloat16(std::ldexp(row[c], -exponent)).x) << c % 2 * 16;
      }
    }
  });
}

std::vector<float> padded(const Tensor& x, float factor) {
  const Tensor values = x.to(at::kFloat).contiguous();
  std::vector<float> result(divide_up(x.size(0), kPanel) * kPanel, 0.f);
  for (const auto i : irange(x.size(0))) result[i] = values.const_data_ptr<float>()[i] * factor;
  return result;
}

void leave_out_diagonal(float* logits, int64_t p, int64_t l, int64_t rows) {
  for (const auto x : irange(kPanel)) {
    const int64_t j = p * kPanel + x - l;
    if (j >= 0 && j < rows) logits[j * kPanel + x] = -std::numeric_limits<float>::infinity();
  }
}

}  // namespace fastssl::cpu
