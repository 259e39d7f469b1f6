// One all-to-all, on whatever backend the process group has for the device; rows travel as bytes, so of any type.
#include "shuffle.h"

#include <ATen/ATen.h>
#include <torch/library.h>
#include <torch/version.h>

#include <numeric>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "tensors/host_buffers.h"

namespace fastssl::ops {
namespace {

// N×bytes of a row: the rows of `x`, whose batch is the outermost dimension in memory.
at::Tensor as_bytes(const at::Tensor& x) {
  const int64_t rows = x.size(0), width = rows == 0 ? 0 : x.numel() / rows;
  return x.as_strided({rows, width}, {width, 1}).view(at::kByte);
}

c10::intrusive_ptr<c10d::Work> all_to_all(at::Tensor output, at::Tensor input, at::IntArrayRef receive,
                                          at::IntArrayRef send, const std::string& name) {
  const auto group = c10d::resolve_process_group(name);
  std::vector<int64_t> to = send.vec(), from = receive.vec();
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
  return group->all_to_all_single(output, input, from, to);
#else
  return group->alltoall_base(output, input, from, to);
#endif
}

}  // namespace

at::Tensor exchange_rows(const at::Tensor& x, const std::optional<at::Tensor>& order, at::IntArrayRef send,
                         at::IntArrayRef receive, const std::string& group) {
  const int64_t sent = std::accumulate(send.begin(), send.end(), int64_t{0});
  TORCH_CHECK_VALUE(x.dim() > 0 && (order ? order->size(0) : x.size(0)) == sent, "send sizes add up to ", sent,
                    ", not to the rows of x: ", x.sizes());
  const at::AutoDispatchBelowADInplaceOrView plain_arithmetic;
  const auto layout = x.suggest_memory_format();
  const at::Tensor rows = as_bytes(x.contiguous(layout));
  std::vector<int64_t> shape = x.sizes().vec();
  shape[0] = std::accumulate(receive.begin(), receive.end(), int64_t{0});
  const at::Tensor shuffled = tensors::empty_reused(shape, x.options().memory_format(layout));
  if (shuffled.numel() + x.numel() == 0) return shuffled;
  const bool alone = send.size() == 1;
  at::Tensor packed = alone ? as_bytes(shuffled) : rows;
  if (order) {
    if (!alone) packed = tensors::empty_reused({sent, rows.size(1)}, rows.options());
    at::index_select_out(packed, rows, 0, *order);
  } else if (alone) {
    packed.copy_(rows);
  }
  if (!alone) c10d::register_work(shuffled, all_to_all(as_bytes(shuffled), packed, receive, send, group));
  return shuffled;
}

}  // namespace fastssl::ops

TORCH_LIBRARY_IMPL(fastssl, CPU, library) { library.impl("exchange_rows_native", &fastssl::ops::exchange_rows); }
TORCH_LIBRARY_IMPL(fastssl, CUDA, library) { library.impl("exchange_rows_cuda", &fastssl::ops::exchange_rows); }
