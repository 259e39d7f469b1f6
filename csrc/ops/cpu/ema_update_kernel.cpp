// The momentum update on the CPU: chunks of all tensors together, taken by the threads as they come free.
#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "../ema_update.h"
#include "ema_chunk.h"
#include "tensors/ema_segments.h"
#include "work.h"

namespace fastssl::ops {
namespace {

constexpr int64_t kChunk = 1 << 16;  // elements: long enough to stream, short enough to share out

}  // namespace

void ema_update_cpu(at::TensorList targets, at::TensorList sources, at::TensorList shadows, double momentum,
                    const std::optional<at::Tensor>& momentum_tensor) {
  const at::AutoDispatchBelowADInplaceOrView plain_arithmetic;
  const double m = momentum_tensor ? momentum_tensor->item<double>() : momentum;
  const tensors::Segments segments(targets, sources, shadows);
  const std::vector<Segment>& list = segments.list();
  std::vector<int64_t> ends;  // of the segments, in chunks
  ends.reserve(list.size());
  for (const Segment& segment : list) {
    ends.push_back((ends.empty() ? 0 : ends.back()) + cpu::divide_up(segment.count, kChunk));
  }
  cpu::over_items(ends.empty() ? 0 : ends.back(), [&](int64_t item) {
    const size_t at = std::upper_bound(ends.begin(), ends.end(), item) - ends.begin();
    const int64_t begin = (item - (at == 0 ? 0 : ends[at - 1])) * kChunk;
    cpu::ema_chunk(list[at], begin, std::min(begin + kChunk, list[at].count), m);
  });
  segments.write_back();
}

}  // namespace fastssl::ops
