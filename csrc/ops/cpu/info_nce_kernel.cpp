// InfoNCE in tiles: panels of queries meet the keys piece by piece, with a running maximum, sum and attention output.
//
// Work items are (block of queries) × (split of the keys). Their number depends on the shape alone and the splits are
// combined in order, so the same input gives the same bits on any number of threads. All logits are in base 2.
#include <ATen/ATen.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <limits>
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
using cpu::Pair;
using cpu::panel;
using cpu::Queries;
using cpu::QueryPairs;
using cpu::splits_for;
using cpu::Tile;
using cpu::UnitRows;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 4;  // panels that share a tile while it is in the cache

// What the splits of the negatives contribute to each query: the maximum of its logits, the sum of 2^(logit − maximum),
// and the keys summed with these weights.
struct Partials {
  int64_t splits, panels, d;
  std::vector<float> maximum, sum;  // splits×panels×32
  Tensor keys;                      // splits×panels×D×32

  Partials(int64_t splits, int64_t n, int64_t d, bool gradients)
      : splits(splits),
        panels(divide_up(n, kPanel)),
        d(d),
        maximum(splits * panels * kPanel, -kInf),
        sum(splits * panels * kPanel, 0.f),
        keys(gradients ? floats({splits, panels, d, kPanel}) : floats({0})) {}
  int64_t at(int64_t split, int64_t p) const { return (split * panels + p) * kPanel; }
  float* panel(int64_t split, int64_t p) const { return data(keys) + at(split, p) * d; }
};

struct Outputs {
  Tensor loss, lse, query, positive, temperature;

  Outputs(int64_t n, int64_t d, bool gradients)
      : loss(floats({n})),
        lse(floats({n})),
        query(gradients ? floats({n, d}) : floats({0})),
        positive(gradients ? floats({n, d}) : floats({0})),
        temperature(gradients ? floats({n}) : floats({0})) {}
};

// The splits of one panel, combined in order.
struct Combined {
  float maximum[kPanel], sum[kPanel];
  std::vector<float> keys;  // D×32, weighted sums

  Combined(const Partials& partials, int64_t p, bool gradients) : keys(gradients ? partials.d * kPanel : 0, 0.f) {
    std::fill_n(maximum, kPanel, -kInf);
    std::fill_n(sum, kPanel, 0.f);
    for (const auto s : irange(partials.splits)) {
      for (const auto x : irange(kPanel)) maximum[x] = std::max(maximum[x], partials.maximum[partials.at(s, p) + x]);
    }
    for (const auto s : irange(partials.splits)) {
      const float* const its_maximum = partials.maximum.data() + partials.at(s, p);
      float weight[kPanel];
      for (const auto x : irange(kPanel)) {
        weight[x] = its_maximum[x] == -kInf ? 0.f : std::exp2(its_maximum[x] - maximum[x]);
        // A sum without a maximum is 0, or NaN, which must not get lost.
        sum[x] += its_maximum[x] == -kInf ? partials.sum[partials.at(s, p) + x]
                                          : weight[x] * partials.sum[partials.at(s, p) + x];
      }
      // A split without keys has summed up nothing, not even zeros.
      if (!gradients || std::all_of(its_maximum, its_maximum + kPanel, [](float m) { return m == -kInf; })) continue;
      const float* const its_keys = partials.panel(s, p);
      for (const auto c : irange(partials.d)) {
        for (const auto x : irange(kPanel)) keys[c * kPanel + x] += weight[x] * its_keys[c * kPanel + x];
      }
    }
  }
};

// With a the attention output over the negatives and p₊ the positive's probability,
// dq̂ = (1 − p₊)(a − k̂⁺)/T, dk̂⁺ = −(1 − p₊)q̂/T and dT = −q̂·dq̂/T.
Outputs combine(const Partials& partials, const UnitRows& query, const UnitRows& positive, float t, bool gradients) {
  const int64_t n = query.n, d = query.d;
  Outputs out(n, d, gradients);
  cpu::parallel_for(0, partials.panels, 1, [&](int64_t begin, int64_t end) {
    for (const auto p : irange(begin, end)) {
      const Combined all(partials, p, gradients);
      for (int64_t i = p * kPanel, x = 0; i < n && x < kPanel; ++i, ++x) {
        const float* const q = query.row(i);
        const float* const k = positive.row(i);
        const float logit = cpu::dot(q, k, d) / t;
        const float difference = all.maximum[x] / cpu::kLog2e + std::log(all.sum[x]) - logit;  // −∞ without negatives
        const float loss = std::max(difference, 0.f) + std::log1p(std::exp(-std::abs(difference)));
        data(out.loss)[i] = std::isnan(all.sum[x]) ? all.sum[x] : loss;
        data(out.lse)[i] = logit + loss;
        if (!gradients) continue;

        const float rest = 1.f / (1.f + std::exp(-difference));  // 1 − p₊
        const float to_attention = all.sum[x] == 0.f ? 0.f : rest / (all.sum[x] * t);
        float* const dq = data(out.query) + i * d;
        float* const dk = data(out.positive) + i * d;
        for (const auto c : irange(d)) {
          dq[c] = to_attention * all.keys[c * kPanel + x] - rest / t * k[c];
          dk[c] = -rest / t * q[c];
        }
        data(out.temperature)[i] = -cpu::dot(q, dq, d) / t;
        cpu::backward_of_normalize_(dq, q, query.lengths[i], d);
        cpu::backward_of_normalize_(dk, k, positive.lengths[i], d);
      }
    }
  });
  return out;
}

// negatives M×D shared by all queries; in-batch, they are the positive keys.
Partials unpaired(const Queries& queries, int64_t n, const Keys& keys, bool exclude_diagonal, bool gradients) {
  const int64_t d = queries.d, tile = keys_of_tile(d), blocks = divide_up(queries.panels, kBlock);
  Partials partials(splits_for(blocks, keys.count(), tile), n, d, gradients);
  const int64_t splits = partials.splits, count = keys.count();
  cpu::over_splits(blocks, splits, count, tile, [&](int64_t block, int64_t split, int64_t from, int64_t to) {
    const Tensor scratch = floats({tile, d}), tile_logits = floats({tile, kPanel});
    float* const logits = data(tile_logits);
    float rescale[kPanel];
    for (int64_t l = from, rows = 0; l < to; l += rows) {
      rows = keys.together(l, std::min(tile, to - l));
      const Tile<float> k = keys.load(l, rows, data(scratch));
      for (const auto p : irange(block * kBlock, std::min((block + 1) * kBlock, queries.panels))) {
        panel().multiply(k.data, k.stride, 1, queries.panel(p), kPanel, rows, d, false, logits, kPanel);
        if (exclude_diagonal) cpu::leave_out_diagonal(logits, p, l, rows);
        const int64_t at = partials.at(split, p);
        const bool changed = panel().absorb(logits, rows, &partials.maximum[at], &partials.sum[at], rescale);
        if (!gradients) continue;
        if (changed && l > from) panel().scale(partials.panel(split, p), d, rescale);
        panel().multiply(k.data, 1, k.stride, logits, kPanel, d, rows, l > from, partials.panel(split, p), kPanel);
      }
    }
  });
  return partials;
}

// The same for bfloat16 queries and keys: raw rows are multiplied, the lengths divided out of the products.
Partials unpaired_pairs(const QueryPairs& queries, int64_t n, int64_t d, const Keys& keys, bool gradients) {
  const int64_t tile = keys_of_tile(d), panels = divide_up(n, kPanel), blocks = divide_up(panels, kBlock);
  Partials partials(splits_for(blocks, keys.count(), tile), n, d, gradients);
  const int64_t splits = partials.splits, count = keys.count();
  cpu::over_splits(blocks, splits, count, tile, [&](int64_t block, int64_t split, int64_t from, int64_t to) {
    const Tensor tile_logits = floats({tile, kPanel});
    std::vector<Pair> scratch(tile * queries.pairs), weights(tile / 2 * kPanel), rows_in_pairs(tile / 2 * d);
    std::vector<float> inverse_lengths(tile);
    float* const logits = data(tile_logits);
    float rescale[kPanel];
    for (int64_t l = from, rows = 0; l < to; l += rows) {
      rows = keys.together(l, std::min(tile, to - l));
      const Tile<Pair> k = keys.load_pairs(l, rows, scratch.data(), inverse_lengths.data());
      if (gradients) cpu::interleave_rows(k.data, k.stride, rows, d, rows_in_pairs.data());
      for (const auto p : irange(block * kBlock, std::min((block + 1) * kBlock, panels))) {
        panel().multiply_pairs(k.data, k.stride, 1, queries.panel(p), kPanel, rows, queries.pairs, false, logits,
                               kPanel);
        const int64_t at = partials.at(split, p);
        const bool changed = panel().absorb_pairs(logits, rows, &queries.scale[p * kPanel], inverse_lengths.data(),
                                                  &partials.maximum[at], &partials.sum[at], rescale, weights.data());
        if (!gradients) continue;
        if (changed && l > from) panel().scale(partials.panel(split, p), d, rescale);
        panel().multiply_pairs(rows_in_pairs.data(), 1, d, weights.data(), kPanel, d, divide_up(rows, 2), l > from,
                               partials.panel(split, p), kPanel);
      }
    }
  });
  return partials;
}

// negatives N×M×D: each query has its own.
Partials paired(const UnitRows& query, float factor, const Tensor& negatives, bool normalized, bool gradients) {
  const int64_t n = query.n, d = query.d, m = negatives.size(1), tile = keys_of_tile(d);
  Partials partials(splits_for(n, m, tile), n, d, gradients);
  cpu::over_splits(n, partials.splits, m, tile, [&](int64_t i, int64_t split, int64_t from, int64_t to) {
    if (from == to) return;
    const Keys keys(negatives[i], std::nullopt, std::nullopt, normalized);
    const Tensor scratch = floats({tile, d});
    std::vector<float> logits(tile), weighted(d, 0.f);
    float& maximum = partials.maximum[partials.at(split, 0) + i];
    float& sum = partials.sum[partials.at(split, 0) + i];
    for (int64_t l = from; l < to; l += tile) {
      const int64_t rows = std::min(tile, to - l);
      const Tile<float> k = keys.load(l, rows, data(scratch));
      for (const auto j : irange(rows)) logits[j] = factor * cpu::dot(query.row(i), k.data + j * k.stride, d);
      const float rescale = cpu::absorb(logits.data(), rows, maximum, sum);
      if (!gradients) continue;
      if (rescale != 1.f) cpu::scale_(weighted.data(), rescale, d);
      for (const auto j : irange(rows)) cpu::axpy_(weighted.data(), logits[j], k.data + j * k.stride, d);
    }
    if (!gradients) return;
    float* const column = partials.panel(split, i / kPanel) + i % kPanel;
    for (const auto c : irange(d)) column[c * kPanel] = weighted[c];
  });
  return partials;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_cpu(
    const Tensor& query, const Tensor& positive_key, const std::optional<Tensor>& negative_keys, double temperature,
    const std::optional<Tensor>& temperature_tensor, const std::optional<Tensor>& first,
    const std::optional<Tensor>& count, bool negatives_normalized, bool gradients) {
  cpu::check_rows(query, positive_key);
  if (negative_keys) cpu::check_rows(query, *negative_keys);
  TORCH_CHECK(positive_key.sizes() == query.sizes(), "positive_key must be of shape ", query.sizes(), ", got ",
              positive_key.sizes());
  const at::AutoDispatchBelowADInplaceOrView plain_arithmetic;
  const float t = cpu::scalar(temperature, temperature_tensor), factor = cpu::kLog2e / t;
  const UnitRows q(query), k(positive_key);
  const auto partials = [&] {
    if (!negative_keys) return unpaired({q, factor}, q.n, {k.rows(), first, count, true}, true, gradients);
    if (negative_keys->dim() == 3) return paired(q, factor, *negative_keys, negatives_normalized, gradients);
    const Keys keys(*negative_keys, first, count, negatives_normalized);
    if (query.scalar_type() == at::kBFloat16) return unpaired_pairs({query, q, factor}, q.n, q.d, keys, gradients);
    return unpaired({q, factor}, q.n, keys, false, gradients);
  }();
  const Outputs out = combine(partials, q, k, t, gradients);
  return {out.loss, out.lse, out.query, out.positive, out.temperature};
}

}  // namespace fastssl::ops
