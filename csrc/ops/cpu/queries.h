// Queries as the kernels read them: unit rows, and panels of 32 side by side.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "panel.h"
#include "rows.h"

namespace fastssl::cpu {

// Few rows, normalised once: unit vectors and the lengths they had. Zeros fill whole panels in both directions.
struct UnitRows {
  int64_t n, d, stride;
  at::Tensor unit;
  std::vector<Length> lengths;

  explicit UnitRows(const at::Tensor& x);
  float* row(int64_t i) const { return unit.mutable_data_ptr<float>() + i * stride; }
  at::Tensor rows() const { return unit.narrow(0, 0, n).narrow(1, 0, d); }
};

// Queries side by side, zeros where the last panel has none.
struct Queries {
  int64_t panels, d;
  at::Tensor columns;  // panels×D×32: unit queries times `factor`, log2(e)/T, so that products are logits

  Queries(const UnitRows& query, float factor);
  const float* panel(int64_t p) const { return columns.const_data_ptr<float>() + p * d * kPanel; }
};

// bfloat16 queries side by side, never rounded: a power of two keeps the products of huge rows in range, and `scale`
// makes logits of them.
struct QueryPairs {
  int64_t pairs;
  std::vector<Pair> columns;  // panels×⌈D/2⌉×32
  std::vector<float> scale;   // panels×32

  QueryPairs(const at::Tensor& query, const UnitRows& unit, float factor);
  const Pair* panel(int64_t p) const { return columns.data() + p * pairs * kPanel; }
};

// x·factor per query (N) in whole panels, zeros where there is no query.
std::vector<float> padded(const at::Tensor& x, float factor);

// In-batch, query i leaves out key i. Logits of panel p against keys l…l+rows−1.
void leave_out_diagonal(float* logits, int64_t p, int64_t l, int64_t rows);

// Raises unless query (N×D) and keys (…×D) are what the kernels take.
void check_rows(const at::Tensor& query, const at::Tensor& keys);

}  // namespace fastssl::cpu
