// The gradient of InfoNCE's negatives: a tile of keys meets all queries, so that no two threads write to one place.
#include <ATen/ATen.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../info_nce.h"
#include "keys.h"
#include "panel.h"
#include "queries.h"
#include "rows.h"
#include "work.h"

namespace fastssl::ops {
namespace {

using at::Tensor;
using c10::irange;
using cpu::data;
using cpu::divide_up;
using cpu::floats;
using cpu::Keys;
using cpu::keys_of_tile;
using cpu::kPanel;
using cpu::Length;
using cpu::panel;
using cpu::Queries;
using cpu::splits_for;
using cpu::Tile;
using cpu::UnitRows;

// Σᵢ wᵢ·pᵢⱼ·q̂ᵢ for every valid key j, brought through its normalisation.
void unpaired_negatives(const UnitRows& query, const Queries& queries, const std::vector<float>& lse,
                        const std::vector<float>& weight, const Keys& keys, bool exclude_diagonal,
                        const Tensor& gradient) {
  const int64_t d = query.d, wide = query.stride, tile = keys_of_tile(d);
  cpu::over_items(divide_up(keys.count(), tile), [&](int64_t item) {
    const Tensor scratch = floats({tile, d}), tile_logits = floats({tile, kPanel}), sums = floats({tile, wide});
    std::vector<Length> lengths(tile);
    const int64_t last = std::min((item + 1) * tile, keys.count());
    for (int64_t l = item * tile, rows = 0; l < last; l += rows) {
      rows = keys.together(l, last - l);
      const Tile<float> k = keys.load(l, rows, data(scratch), lengths.data());
      for (const auto p : irange(queries.panels)) {
        float* const logits = data(tile_logits);
        panel().multiply(k.data, k.stride, 1, queries.panel(p), kPanel, rows, d, false, logits, kPanel);
        if (exclude_diagonal) cpu::leave_out_diagonal(logits, p, l, rows);
        panel().weigh(logits, rows, &lse[p * kPanel], &weight[p * kPanel]);
        for (int64_t c = 0; c < wide; c += kPanel) {
          panel().multiply(logits, kPanel, 1, query.row(p * kPanel) + c, wide, rows, kPanel, p > 0, data(sums) + c,
                           wide);
        }
      }
      for (const auto j : irange(rows)) {
        cpu::backward_of_normalize_(data(sums) + j * wide, k.data + j * k.stride, lengths[j], d);
      }
      gradient.narrow(0, keys.place(l), rows).copy_(sums.narrow(0, 0, rows).narrow(1, 0, d));
    }
  });
}

void paired_negatives(const UnitRows& query, float factor, const std::vector<float>& lse,
                      const std::vector<float>& weight, const Tensor& negatives, bool normalized,
                      const Tensor& gradient) {
  const int64_t n = query.n, d = query.d, m = negatives.size(1), tile = keys_of_tile(d);
  cpu::over_splits(n, splits_for(n, m, tile), m, tile, [&](int64_t i, int64_t /*split*/, int64_t from, int64_t to) {
    const Keys keys(negatives[i], std::nullopt, std::nullopt, normalized);
    const Tensor scratch = floats({tile, d}), result = floats({tile, d});
    std::vector<Length> lengths(tile);
    for (int64_t l = from; l < to; l += tile) {
      const int64_t rows = std::min(tile, to - l);
      const Tile<float> k = keys.load(l, rows, data(scratch), lengths.data());
      for (const auto j : irange(rows)) {
        const float* const key = k.data + j * k.stride;
        float* const g = data(result) + j * d;
        const float logit = factor * cpu::dot(query.row(i), key, d);
        std::copy_n(query.row(i), d, g);
        cpu::scale_(g, std::exp2(logit - lse[i]) * weight[i], d);
        cpu::backward_of_normalize_(g, key, lengths[j], d);
      }
      gradient[i].narrow(0, l, rows).copy_(result.narrow(0, 0, rows));
    }
  });
}

}  // namespace

Tensor info_nce_negatives_cpu(const Tensor& grad_loss, const Tensor& lse, const Tensor& query,
                              const Tensor& negative_keys, double temperature,
                              const std::optional<Tensor>& temperature_tensor, const std::optional<Tensor>& first,
                              const std::optional<Tensor>& count, bool negatives_normalized, bool exclude_diagonal) {
  cpu::check_rows(query, negative_keys);
  TORCH_CHECK(
      grad_loss.dim() == 1 && lse.dim() == 1 && grad_loss.size(0) == query.size(0) && lse.size(0) == query.size(0),
      "grad and lse must have ", query.size(0), " elements, got ", grad_loss.sizes(), " and ", lse.sizes());
  const at::AutoDispatchBelowADInplaceOrView plain_arithmetic;
  const Tensor gradient = at::zeros(negative_keys.sizes(), exclude_diagonal ? at::kFloat : negative_keys.scalar_type());
  if (gradient.numel() == 0 || query.size(0) == 0) return gradient;
  const float t = cpu::scalar(temperature, temperature_tensor), factor = cpu::kLog2e / t;
  const UnitRows q(query);
  const std::vector<float> base2 = cpu::padded(lse, cpu::kLog2e), weight = cpu::padded(grad_loss, 1.f / t);
  if (negative_keys.dim() == 3) {
    paired_negatives(q, factor, base2, weight, negative_keys, negatives_normalized, gradient);
  } else {
    const Keys keys(negative_keys, first, count, negatives_normalized);
    unpaired_negatives(q, {q, factor}, base2, weight, keys, exclude_diagonal, gradient);
  }
  return gradient;
}

}  // namespace fastssl::ops
