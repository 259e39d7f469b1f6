// BYOL's loss row by row: ‖p̂ − ẑ‖², which is 2 − 2·cos without the cancellation near 0; its gradient is 2(p̂ − ẑ).
#include <ATen/ATen.h>
#include <c10/util/irange.h>

#include <algorithm>

#include "../normalized_mse.h"
#include "rows.h"
#include "work.h"

namespace fastssl::ops {
namespace {

constexpr int64_t kRows = 64;  // rows of a tile: both inputs stay in the first-level cache

}  // namespace

std::tuple<at::Tensor, at::Tensor> normalized_mse_cpu(const at::Tensor& prediction, const at::Tensor& target,
                                                      bool gradients) {
  TORCH_CHECK(prediction.dim() == 2 && prediction.sizes() == target.sizes(), "prediction and target must be N×D, got ",
              prediction.sizes(), " and ", target.sizes());
  const at::AutoDispatchBelowADInplaceOrView plain_arithmetic;
  const int64_t n = prediction.size(0), d = prediction.size(1);
  const at::Tensor loss = at::empty({n}, at::kFloat);
  const at::Tensor gradient = gradients ? at::empty({n, d}, at::kFloat) : at::empty({0}, at::kFloat);
  cpu::parallel_for(0, n, kRows, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView plain_arithmetic;  // a thread does not inherit the caller's
    const at::Tensor p_tile = at::empty({kRows, d}, at::kFloat), z_tile = at::empty({kRows, d}, at::kFloat);
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t rows = std::min(kRows, end - first);
      p_tile.narrow(0, 0, rows).copy_(prediction.narrow(0, first, rows));
      z_tile.narrow(0, 0, rows).copy_(target.narrow(0, first, rows));
      for (const auto i : c10::irange(rows)) {
        float* const p = p_tile.mutable_data_ptr<float>() + i * d;
        float* const z = z_tile.mutable_data_ptr<float>() + i * d;
        const cpu::Length p_length = cpu::length(p, d);
        cpu::scale_(p, p_length.inverse, d);
        cpu::scale_(z, cpu::length(z, d).inverse, d);
        cpu::axpy_(z, -1.f, p, d);  // ẑ − p̂
        loss.mutable_data_ptr<float>()[first + i] = cpu::dot(z, z, d);
        if (!gradients) continue;
        float* const g = gradient.mutable_data_ptr<float>() + (first + i) * d;
        for (const auto c : c10::irange(d)) g[c] = -2.f * z[c];
        cpu::backward_of_normalize_(g, p, p_length, d);
      }
    }
  });
  return {loss, gradient};
}

}  // namespace fastssl::ops
