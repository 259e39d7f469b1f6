// Augmentation of the colours of images on the CPU. fastssl/ops/augment.py has the schema and says what is done.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastssl::ops {

// Writes (augmented images / 255 - mean) / std to `out`, in memory N×H×W×3 like `images`, which stay as they are.
// `steps` are numbers of fastssl.ops.photometric.PHOTOMETRIC, the columns of `parameters` its COLUMNS; the tables are
// those of fastssl.ops.blur.table and are not looked at without a blur.
void augment_cpu(const at::Tensor& images, const at::Tensor& out, const at::Tensor& parameters,
                 const at::Tensor& blur_rows, const at::Tensor& blur_columns, at::IntArrayRef steps,
                 at::ArrayRef<double> mean, at::ArrayRef<double> std);

}  // namespace fastssl::ops
