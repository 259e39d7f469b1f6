// The inner loops of InfoNCE on a panel of 32 queries that lie side by side: products, exponentials, running sums.
//
// A panel of a matrix X with 32 columns is stored row by row, so that a row is one or a few vector registers. The
// logits of a tile are a panel too: row j holds key j against 32 queries, and maxima and sums over the keys need no
// arithmetic across lanes. Everything exists once for each instruction set; `panel()` picks the processor's.
#pragma once

#include <cstdint>

namespace fastssl::cpu {

constexpr int64_t kPanel = 32;

// Two bfloat16, the first one in the low half: what one step of a bfloat16 product takes.
using Pair = uint32_t;

struct Panel {
  // C (rows×32) = A·B, or += with `add`. A's element (r, t) lies at a[r·a_row + t·a_step], B's rows (depth×32) b_row
  // apart, C's c_row apart.
  void (*multiply)(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t rows,
                   int64_t depth, bool add, float* c, int64_t c_row);

  // The same with pairs along the depth: products of bfloat16 values, summed in float32.
  void (*multiply_pairs)(const Pair* a, int64_t a_row, int64_t a_step, const Pair* b, int64_t b_row, int64_t rows,
                         int64_t depth, bool add, float* c, int64_t c_row);

  // Takes the logits (base 2, rows×32) of a tile into the running maximum and sum, and replaces them by their weights
  // 2^(logit − maximum). `rescale` receives the factors (32) for what was summed up before; returns whether any is
  // not 1.
  bool (*absorb)(float* logits, int64_t rows, float* maximum, float* sum, float* rescale);

  // The same for raw products, which become logits when multiplied by query_scale (32) and key_scale (rows); the
  // weights times key_scale are rounded and written as pairs of rows (⌈rows/2⌉×32).
  bool (*absorb_pairs)(float* products, int64_t rows, const float* query_scale, const float* key_scale, float* maximum,
                       float* sum, float* rescale, Pair* weights);

  // logits ← 2^(logit − shift)·weight, with shift and weight per query (32).
  void (*weigh)(float* logits, int64_t rows, const float* shift, const float* weight);

  // C (rows×32) ← C·factor, per query (32).
  void (*scale)(float* c, int64_t rows, const float* factor);

  const char* name;
};

const Panel& panel();

}  // namespace fastssl::cpu
