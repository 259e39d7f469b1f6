// BYOL's loss and its gradient on the CPU, in one pass. fastssl/ops/normalized_mse.py has the schema and the formula.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace fastssl::ops {

// Loss N and the gradient of the prediction N×D (empty without `gradients`), both float32.
std::tuple<at::Tensor, at::Tensor> normalized_mse_cpu(const at::Tensor& prediction, const at::Tensor& target,
                                                      bool gradients);

}  // namespace fastssl::ops
