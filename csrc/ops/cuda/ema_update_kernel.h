// The momentum update of many tensors in one launch. Without torch, so that nvcc is quick and a CPU can run it in
// tests.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../ema_segment.h"

namespace fastssl::ops {

// Updates all segments on `stream`. m is `*momentum_on_device`, read when the kernel runs, or `momentum` if that is
// null.
cudaError_t ema_update_launch(const Segment* segments, std::size_t count, double momentum,
                              const double* momentum_on_device, cudaStream_t stream);

}  // namespace fastssl::ops
