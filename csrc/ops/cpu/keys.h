// The valid negatives in the order first, first+1, … (modulo M), handed out in tiles.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "panel.h"
#include "rows.h"

namespace fastssl::cpu {

// Rows of T, `stride` elements apart.
template <typename T>
struct Tile {
  const T* data;
  int64_t stride;
};

class Keys {
 public:
  Keys(const at::Tensor& keys, const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& count,
       bool normalized);

  int64_t count() const { return count_; }

  // The place of the l-th valid row, and how many of the next `rows` lie behind it before the ring wraps.
  int64_t place(int64_t l) const { return (first_ + l) % keys_.size(0); }
  int64_t together(int64_t l, int64_t rows) const;

  // Unit rows l…l+rows−1, which must lie together; `scratch` (rows×D) holds them unless they are read where they lie.
  // Keys that were given as unit rows have no normalisation to go back through: {1, false} leaves a gradient as it is.
  Tile<float> load(int64_t l, int64_t rows, float* scratch, Length* lengths = nullptr) const;

  // bfloat16 rows as they are, as pairs of components (⌈D/2⌉ each), and what makes them unit rows.
  Tile<Pair> load_pairs(int64_t l, int64_t rows, Pair* scratch, float* inverse_lengths) const;

 private:
  at::Tensor keys_;
  bool normalized_, plain_rows_;
  int64_t first_, count_;
};

}  // namespace fastssl::cpu
