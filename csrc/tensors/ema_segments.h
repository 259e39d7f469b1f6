// Tensors of any layout as flat segments that the kernels of both devices take.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "ops/ema_segment.h"

namespace fastssl::tensors {

// Where the layouts of target, source and shadow differ or have gaps, a copy stands in for a tensor; `write_back`
// brings the results home.
class Segments {
 public:
  Segments(at::TensorList targets, at::TensorList sources, at::TensorList shadows);

  const std::vector<ops::Segment>& list() const { return list_; }
  void write_back() const;

 private:
  void add(const at::Tensor& target, const at::Tensor& source, const at::Tensor* shadow);
  at::Tensor in_layout_of(const at::Tensor& target, const at::Tensor& source);

  std::vector<ops::Segment> list_;
  std::vector<at::Tensor> kept_;
  std::vector<std::pair<at::Tensor, at::Tensor>> back_;  // to, from
};

}  // namespace fastssl::tensors
