// The queue of keys on the CPU. fastssl/ops/queue.py has the schemas and says what tail and filled are.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastssl::ops {

// Writes the normalised rows of `keys` behind the newest of `queue`; `arrived` is of use to the GPU's kernel only.
void enqueue_cpu(const at::Tensor& queue, const at::Tensor& tail, const at::Tensor& filled, const at::Tensor& arrived,
                 const at::Tensor& keys);

// Drops the `count` oldest of `capacity` rows.
void dequeue_cpu(const at::Tensor& tail, const at::Tensor& filled, int64_t capacity, int64_t count);

}  // namespace fastssl::ops
