// Whether lists of tensors are what the momentum update takes, at the least cost: it is asked at every step.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastssl::tensors {

// False also where only a closer look can tell, as for the columns of one matrix: fastssl/ops/ema_inputs.py takes it,
// and has the words for what is wrong.
bool ema_fits(at::TensorList targets, at::TensorList sources, at::TensorList shadows,
              const std::optional<at::Tensor>& momentum);

}  // namespace fastssl::tensors
