// The momentum update of a list of tensors. fastssl/ops/ema.py has the schema, the formula and the checks of the
// inputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastssl::ops {

void ema_update_cpu(at::TensorList targets, at::TensorList sources, at::TensorList shadows, double momentum,
                    const std::optional<at::Tensor>& momentum_tensor);

// On the current stream; a momentum on the device is read there.
void ema_update_cuda(at::TensorList targets, at::TensorList sources, at::TensorList shadows, double momentum,
                     const std::optional<at::Tensor>& momentum_tensor);

}  // namespace fastssl::ops
