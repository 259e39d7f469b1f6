// Tensors in host memory that was used before.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastssl::tensors {

// Like at::empty. On the CPU the memory is that of an earlier tensor which nobody holds any more, a collective in
// flight included: bringing in fresh pages takes longer than a copy. For that the last eight blocks are kept. CUDA's
// allocator does the same by itself.
at::Tensor empty_reused(at::IntArrayRef shape, const at::TensorOptions& options);

}  // namespace fastssl::tensors
