// Vector arithmetic on rows of floats, compiled for several instruction sets and chosen when the library is loaded.
#pragma once

#include <cstdint>

#include "panel.h"

namespace fastssl::cpu {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kEps = 1e-12f;  // of torch.nn.functional.normalize

// Length of x, also where the sum of squares leaves the range of a float.
float norm(const float* x, int64_t n);

float dot(const float* x, const float* y, int64_t n);

// Takes logits (base 2) into a running maximum and sum, and replaces them by their weights 2^(logit − maximum);
// returns the factor for what was summed up before.
float absorb(float* logits, int64_t n, float& maximum, float& sum);

void scale_(float* x, float factor, int64_t n);

void axpy_(float* y, float a, const float* x, int64_t n);  // y ← y + a·x

// Rows of `columns` bfloat16, given in pairs of columns, in pairs of rows: pairs[r/2][c] holds rows r and r+1 (the last
// one perhaps alone) of column c.
void interleave_rows(const Pair* rows, int64_t stride, int64_t count, int64_t columns, Pair* pairs);

// 1/max(‖x‖, ε), and whether ‖x‖ > ε: at or below, the normalisation is a division by ε.
struct Length {
  float inverse;
  bool regular;
};
Length length(const float* x, int64_t n);

// The gradient of a row whose unit vector has the gradient g: (g − (g·unit)·unit)/‖x‖, written over g.
void backward_of_normalize_(float* g, const float* unit, Length length, int64_t n);

}  // namespace fastssl::cpu
