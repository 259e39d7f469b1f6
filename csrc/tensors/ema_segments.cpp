// Most tensors need nothing but their pointers taken: dense ones, whatever the order of their dimensions.
#include "ema_segments.h"

#include <ATen/ATen.h>

#include "element_type.h"

namespace fastssl::tensors {

using ops::Segment;
using ops::Type;

namespace {

// Whether element i of the memory of both is the same element; what the stride of a dimension of size 1 is, is moot.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

}  // namespace

Segments::Segments(at::TensorList targets, at::TensorList sources, at::TensorList shadows) {
  TORCH_CHECK_VALUE(sources.size() == targets.size() && (shadows.empty() || shadows.size() == targets.size()),
                    "targets, sources and shadows must be of equal number");
  list_.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    TORCH_CHECK_VALUE(
        sources[i].sizes() == targets[i].sizes() && (shadows.empty() || shadows[i].sizes() == targets[i].sizes()),
        "target ", i, " differs in shape from its source or shadow");
    if (targets[i].numel() > 0) add(targets[i], sources[i], shadows.empty() ? nullptr : &shadows[i]);
  }
}

void Segments::add(const at::Tensor& given, const at::Tensor& source, const at::Tensor* shadow) {
  at::Tensor target = given;
  if (!given.is_non_overlapping_and_dense()) {
    kept_.push_back(target = given.contiguous());
    back_.emplace_back(given, target);
  }
  const Type type = type_of(target);
  TORCH_CHECK_VALUE(type != Type::kHalf && type != Type::kBFloat16, "a target is ", target.scalar_type());
  TORCH_CHECK_VALUE(type == Type::kBytes || type_of(source) != Type::kBytes, "a source is ", source.scalar_type());
  Segment segment{
      target.data_ptr(), in_layout_of(target, source).const_data_ptr(), nullptr, target.numel(), type, type_of(source),
      Type::kNone};
  if (type == Type::kBytes) segment.count = static_cast<int64_t>(target.nbytes());
  if (shadow != nullptr) {
    const Type wanted = type_of(*shadow);
    const bool fits = type == Type::kBytes ? shadow->scalar_type() == target.scalar_type()
                                           : wanted == Type::kHalf || wanted == Type::kBFloat16;
    if (fits && same_layout(*shadow, target)) {
      segment.shadow = shadow->data_ptr();
      segment.shadow_type = wanted;
    } else {
      back_.emplace_back(*shadow, target);
    }
  }
  list_.push_back(segment);
}

at::Tensor Segments::in_layout_of(const at::Tensor& target, const at::Tensor& source) {
  const bool copied = type_of(target) == Type::kBytes && source.scalar_type() != target.scalar_type();
  if (same_layout(source, target) && !copied) return source;
  const auto dtype = copied ? target.scalar_type() : source.scalar_type();
  kept_.push_back(at::empty_strided(target.sizes(), target.strides(), source.options().dtype(dtype)).copy_(source));
  return kept_.back();
}

void Segments::write_back() const {
  for (const auto& [to, from] : back_) to.copy_(from);
}

}  // namespace fastssl::tensors
