// One all-to-all, on whatever backend the process group has for the device; rows travel as bytes, so of any type.
#include "shuffle.h"

#include <ATen/ATen.h>
#include <torch/library.h>
#include <torch/version.h>

#include <mutex>
#include <numeric>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <unordered_map>
#include <utility>
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

// The exchanges that somebody may still wait for, by where their rows go.
class Exchanges {
 public:
  void add(const at::Tensor& rows, c10::intrusive_ptr<c10d::Work> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    works_[rows.const_data_ptr()] = std::move(work);
  }
  c10::intrusive_ptr<c10d::Work> find(const at::Tensor& rows) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = works_.find(rows.const_data_ptr());
    return found == works_.end() ? nullptr : found->second;
  }
  void remove(const at::Tensor& rows) {
    const std::lock_guard<std::mutex> lock(mutex_);
    works_.erase(rows.const_data_ptr());
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, c10::intrusive_ptr<c10d::Work>> works_;
};

Exchanges& exchanges() {
  static Exchanges& all = *new Exchanges;  // never destroyed: an exchange may outlive the statics
  return all;
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
  if (!alone) exchanges().add(shuffled, all_to_all(as_bytes(shuffled), packed, receive, send, group));
  return shuffled;
}

void wait_rows(const at::Tensor& rows) {
  if (const auto work = exchanges().find(rows)) work->wait();
}

void forget_rows(const at::Tensor& rows) { exchanges().remove(rows); }

}  // namespace fastssl::ops

TORCH_LIBRARY_IMPL(fastssl, CPU, library) {
  library.impl("exchange_rows_native", &fastssl::ops::exchange_rows);
  library.impl("wait_rows_native", &fastssl::ops::wait_rows);
  library.impl("forget_rows_native", &fastssl::ops::forget_rows);
}

TORCH_LIBRARY_IMPL(fastssl, CUDA, library) {
  library.impl("exchange_rows_cuda", &fastssl::ops::exchange_rows);
  library.impl("wait_rows_cuda", &fastssl::ops::wait_rows);
  library.impl("forget_rows_cuda", &fastssl::ops::forget_rows);
}
