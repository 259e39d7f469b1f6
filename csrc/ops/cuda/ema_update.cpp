// The momentum update on the GPU as the dispatcher sees it; what nvcc compiles knows nothing of torch.
#include "../ema_update.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ema_update_kernel.h"
#include "tensors/ema_segments.h"

namespace fastssl::ops {

void ema_update_cuda(at::TensorList targets, at::TensorList sources, at::TensorList shadows, double momentum,
                     const std::optional<at::Tensor>& momentum_tensor) {
  if (targets.empty()) return;
  const c10::cuda::CUDAGuard on_device(targets[0].device());
  const tensors::Segments segments(targets, sources, shadows);
  const bool is_on_gpu = momentum_tensor && momentum_tensor->is_cuda();
  if (momentum_tensor && !is_on_gpu) momentum = momentum_tensor->item<double>();
  const at::Tensor on_gpu = is_on_gpu ? momentum_tensor->to(targets[0].device(), at::kDouble) : at::Tensor();
  C10_CUDA_CHECK(ema_update_launch(segments.list().data(), segments.list().size(), momentum,
                                   is_on_gpu ? on_gpu.const_data_ptr<double>() : nullptr,
                                   c10::cuda::getCurrentCUDAStream()));
  segments.write_back();
}

}  // namespace fastssl::ops

TORCH_LIBRARY_IMPL(fastssl, CUDA, library) { library.impl("ema_update_cuda", &fastssl::ops::ema_update_cuda); }
