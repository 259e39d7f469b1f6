// A few blocks of memory, each in use for as long as somebody besides this list holds its storage.
#include "host_buffers.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

namespace fastssl::tensors {
namespace {

constexpr size_t kBlocks = 8;                  // a step of symmetric MoCo has four in flight
constexpr size_t kSmallest = size_t{1} << 20;  // below, malloc is as quick

class Blocks {
 public:
  at::Storage take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto fits = [bytes](const at::Storage& block) {
      return block.use_count() == 1 && block.nbytes() >= bytes && block.nbytes() <= 2 * bytes;
    };
    const auto found = std::find_if(blocks_.begin(), blocks_.end(), fits);
    if (found != blocks_.end()) {
      std::atomic_thread_fence(std::memory_order_acquire);  // counting does not order what other threads did before
      return *found;
    }
    if (blocks_.size() == kBlocks) {  // those of another batch size go in time
      const auto free = [](const at::Storage& block) { return block.use_count() == 1; };
      const auto first = std::find_if(blocks_.begin(), blocks_.end(), free);
      blocks_.erase(first == blocks_.end() ? blocks_.begin() : first);
    }
    blocks_.push_back(at::empty({static_cast<int64_t>(bytes)}, at::kByte).storage());
    return blocks_.back();
  }

 private:
  std::mutex mutex_;
  std::vector<at::Storage> blocks_;
};

}  // namespace

at::Tensor empty_reused(at::IntArrayRef shape, const at::TensorOptions& options) {
  const at::Tensor like = at::empty(shape, options.device(at::kMeta));
  if (options.device().type() != at::kCPU || like.nbytes() < kSmallest) return at::empty(shape, options);
  static Blocks& blocks = *new Blocks;  // never destroyed: tensors may outlive the statics
  return at::empty({0}, like.options().device(at::kCPU)).set_(blocks.take(like.nbytes()), 0, shape, like.strides());
}

}  // namespace fastssl::tensors
