// InfoNCE and its gradients on the CPU, nothing of size N×M. fastssl/ops/info_nce.py has the schemas and the formula.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastssl::ops {

// loss N, log-sum-exp N, and per row the gradients of query N×D, positive key N×D and temperature N; all float32.
// Without `gradients` the last three are empty. negative_keys: none (in-batch), M×D or N×M×D.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> info_nce_cpu(
    const at::Tensor& query, const at::Tensor& positive_key, const std::optional<at::Tensor>& negative_keys,
    double temperature, const std::optional<at::Tensor>& temperature_tensor, const std::optional<at::Tensor>& first,
    const std::optional<at::Tensor>& count, bool negatives_normalized, bool gradients);

// The gradient of the negatives, in their dtype; in-batch (`exclude_diagonal`) in float32, for it is only a part.
at::Tensor info_nce_negatives_cpu(const at::Tensor& grad_loss, const at::Tensor& lse, const at::Tensor& query,
                                  const at::Tensor& negative_keys, double temperature,
                                  const std::optional<at::Tensor>& temperature_tensor,
                                  const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& count,
                                  bool negatives_normalized, bool exclude_diagonal);

}  // namespace fastssl::ops
