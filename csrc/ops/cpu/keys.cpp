// Reads tiles out of a ring of keys of any dtype and strides.
#include "keys.h"

#include <ATen/ATen.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace fastssl::cpu {

using c10::irange;

Keys::Keys(const at::Tensor& keys, const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& count,
           bool normalized)
    : keys_(keys), normalized_(normalized), plain_rows_(keys.stride(1) == 1) {
  const int64_t rows = keys.size(0);
  count_ = count ? std::clamp<int64_t>(count->item<int64_t>(), 0, rows) : rows;
  first_ = first && rows > 0 ? (first->item<int64_t>() % rows + rows) % rows : 0;
}

int64_t Keys::together(int64_t l, int64_t rows) const { return std::min(rows, keys_.size(0) - place(l)); }

Tile<float> Keys::load(int64_t l, int64_t rows, float* scratch, Length* lengths) const {
  const at::Tensor source = keys_.narrow(0, place(l), rows);
  const int64_t d = source.size(1);
  if (lengths) std::fill_n(lengths, rows, Length{1.f, false});
  if (normalized_ && plain_rows_ && keys_.scalar_type() == at::kFloat) {
    return {source.const_data_ptr<float>(), source.stride(0)};
  }
  at::from_blob(scratch, {rows, d}, at::kFloat).copy_(source);
  if (!normalized_) {
    for (const auto j : irange(rows)) {
      const Length length = cpu::length(scratch + j * d, d);
      scale_(scratch + j * d, length.inverse, d);
      if (lengths) lengths[j] = length;
    }
  }
  return {scratch, d};
}

Tile<Pair> Keys::load_pairs(int64_t l, int64_t rows, Pair* scratch, float* inverse_lengths) const {
  const at::Tensor source = keys_.narrow(0, place(l), rows);
  const int64_t d = source.size(1), pairs = (d + 1) / 2;
  const uint16_t* data = reinterpret_cast<const uint16_t*>(source.const_data_ptr<at::BFloat16>());
  int64_t stride = source.stride(0);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(Pair) == 0;
  if (!plain_rows_ || d % 2 != 0 || stride % 2 != 0 || !aligned) {
    uint16_t* const copy = reinterpret_cast<uint16_t*>(scratch);
    const at::Tensor padded = at::from_blob(copy, {rows, 2 * pairs}, at::kBFloat16);
    padded.narrow(1, 0, d).copy_(source);
    padded.narrow(1, d, 2 * pairs - d).zero_();
    data = copy;
    stride = 2 * pairs;
  }
  std::fill_n(inverse_lengths, rows, 1.f);
  if (!normalized_) {
    std::vector<float> row(d);
    for (const auto j : irange(rows)) {
      for (const auto c : irange(d)) row[c] = std::bit_cast<float>(static_cast<uint32_t>(data[j * stride + c]) << 16);
      inverse_lengths[j] = length(row.data(), d).inverse;
    }
  }
  return {reinterpret_cast<const Pair*>(data), stride / 2};
}

}  // namespace fastssl::cpu
