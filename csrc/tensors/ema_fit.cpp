// Shapes, devices and dtypes pair by pair, then the memory of all tensors in the order of their addresses.
#include "ema_fit.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastssl::tensors {
namespace {

struct Extent {
  uintptr_t begin, end;
  bool written;
};

bool is_plain(const at::Tensor& x) {
  return x.defined() && x.layout() == at::kStrided && (x.is_cpu() || x.is_cuda()) && x.has_storage() &&
         !x.key_set().has(c10::DispatchKey::Python);
}

bool same_place_and_shape(const at::Tensor& a, const at::Tensor& b) {
  return is_plain(b) && a.device() == b.device() && a.sizes() == b.sizes();
}

bool dtypes_fit(at::ScalarType target, at::ScalarType source) {
  if (target != at::kFloat && target != at::kDouble) {
    return !at::isFloatingType(target) && !at::isComplexType(target) && source == target;
  }
  return source == at::kFloat || source == at::kDouble || source == at::kHalf || source == at::kBFloat16;
}

// Whether its elements lie in places of their own, with nothing in between.
bool add_extent(std::vector<Extent>& extents, const at::Tensor& x, bool written) {
  if (x.numel() == 0) return true;
  if (!x.is_contiguous() && !x.is_non_overlapping_and_dense()) return false;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  extents.push_back({begin, begin + x.nbytes(), written});
  return true;
}

bool apart(std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  uintptr_t end = 0, end_of_written = 0;
  for (const Extent& extent : extents) {
    if (extent.begin < (extent.written ? end : end_of_written)) return false;
    end = std::max(end, extent.end);
    if (extent.written) end_of_written = std::max(end_of_written, extent.end);
  }
  return true;
}

}  // namespace

bool ema_fits(at::TensorList targets, at::TensorList sources, at::TensorList shadows,
              const std::optional<at::Tensor>& momentum) {
  if (sources.size() != targets.size() || !(shadows.empty() || shadows.size() == targets.size())) return false;
  std::vector<Extent> extents;
  extents.reserve(targets.size() + sources.size() + shadows.size() + 1);
  for (size_t i = 0; i < targets.size(); ++i) {
    const at::Tensor &target = targets[i], &source = sources[i];
    if (!is_plain(target) || target.device() != targets[0].device()) return false;
    if (!same_place_and_shape(target, source)) return false;
    if (!dtypes_fit(target.scalar_type(), source.scalar_type())) return false;
    if (!add_extent(extents, target, true) || !add_extent(extents, source, false)) return false;
    if (shadows.empty()) continue;
    if (!same_place_and_shape(target, shadows[i])) return false;
    if (at::isFloatingType(target.scalar_type()) != at::isFloatingType(shadows[i].scalar_type())) return false;
    if (!add_extent(extents, shadows[i], true)) return false;
  }
  if (momentum && !targets.empty()) {
    if (!is_plain(*momentum) || !(momentum->is_cpu() || momentum->device() == targets[0].device())) return false;
    if (!add_extent(extents, *momentum, false)) return false;
  }
  return apart(extents);
}

}  // namespace fastssl::tensors
