// The type of a tensor's elements in the words of the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/ema_segment.h"

namespace fastssl::tensors {

// kBytes for all that the kernels do not compute with.
inline ops::Type type_of(const at::Tensor& x) {
  using ops::Type;
  switch (x.scalar_type()) {
    case at::kFloat:
      return Type::kFloat;
    case at::kDouble:
      return Type::kDouble;
    case at::kHalf:
      return Type::kHalf;
    case at::kBFloat16:
      return Type::kBFloat16;
    default:
      return Type::kBytes;
  }
}

}  // namespace fastssl::tensors
