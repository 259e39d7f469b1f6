#include "band.h"

#include <algorithm>
#include <cmath>

namespace fastssl::cpu {
namespace {

constexpr float kNothing = 0x1p-24f;

}  // namespace

Band::Band(const float* table, int64_t rows, int64_t side)
    : table_(table), rows_(rows), side_(side), middle_(rows / 2) {
  const float* const weights = table + middle_ * rows;
  for (int64_t t = 0; t < rows; ++t) {
    if (!(std::abs(weights[t]) < kNothing)) radius_ = std::max(radius_, std::abs(t - middle_));
  }
  // As many weights on both sides of the middle, or else no row stands for others.
  begin_ = middle_ + radius_ < rows ? radius_ : side;
}

Band::Line Band::operator[](int64_t i) const {
  const int64_t count = std::min(rows_, 2 * radius_ + 1);
  if (i < begin_) return {table_ + i * rows_, 0, count};
  if (i < side_ - begin_) return {table_ + middle_ * rows_ + middle_ - radius_, i - radius_, count};
  return {table_ + (i - side_ + rows_) * rows_ + rows_ - count, side_ - count, count};
}

}  // namespace fastssl::cpu
