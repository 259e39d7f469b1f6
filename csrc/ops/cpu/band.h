// A blur along a line of pixels as fastssl/ops/blur.py tabulates it: which neighbours each pixel sums up.
#pragma once

#include <cstdint>

namespace fastssl::cpu {

// The T×T table of a blur of `side` pixels. Weights so small that they change no digit of a float are left out; `edge`
// pixels at either end have weights of their own.
class Band {
 public:
  Band() = default;
  Band(const float* table, int64_t rows, int64_t side);

  // Weights of pixel i, those of the pixels from `first` on.
  struct Line {
    const float* weights;
    int64_t first, count;
  };
  Line operator[](int64_t i) const;

  int64_t edge_begin() const { return begin_; }                     // pixels from 0 on
  int64_t edge_end() const { return begin_ < side_ ? begin_ : 0; }  // pixels up to `side`

 private:
  const float* table_ = nullptr;
  int64_t rows_ = 0, side_ = 0, middle_ = 0, radius_ = 0, begin_ = 0;
};

}  // namespace fastssl::cpu
