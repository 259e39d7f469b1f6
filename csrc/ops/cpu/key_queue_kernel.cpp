// Enqueue and dequeue in place: nothing is allocated, and what a call costs depends on its own rows alone.
#include <ATen/ATen.h>

#include <algorithm>

#include "../key_queue.h"
#include "tensors/element_type.h"
#include "unit_row.h"
#include "work.h"

namespace fastssl::ops {
namespace {

// Elements of a work item at least, as torch's own loops have it. MoCo's batch of 256 keys of 128 numbers is one item:
// a second thread saves 3 µs of 27, and costs 26 where a loader's worker has its core.
constexpr int64_t kElements = at::internal::GRAIN_SIZE;

int64_t& integer(const at::Tensor& x) { return *x.mutable_data_ptr<int64_t>(); }

// Modulo `size`, also of a negative number.
int64_t wrapped(int64_t at, int64_t size) { return (at % size + size) % size; }

}  // namespace

void enqueue_cpu(const at::Tensor& queue, const at::Tensor& tail, const at::Tensor& filled, const at::Tensor&,
                 const at::Tensor& keys) {
  TORCH_CHECK_VALUE(queue.dim() == 2 && queue.is_contiguous() && keys.dim() == 2 && keys.size(1) == queue.size(1),
                    "queue must be a contiguous K×D and keys N×D, got ", queue.sizes(), " and ", keys.sizes());
  TORCH_CHECK_VALUE(queue.size(0) > 0, "queue has no rows");
  for (const at::Tensor& x : {queue, keys}) {
    const Type type = tensors::type_of(x);
    TORCH_CHECK_VALUE(type != Type::kBytes && type != Type::kDouble, "queue and keys cannot be ", x.scalar_type());
  }
  const int64_t capacity = queue.size(0), dim = queue.size(1), count = keys.size(0);
  const int64_t kept = std::min(count, capacity);  // of more keys than rows, the newest stay
  const int64_t oldest = wrapped(integer(tail), capacity), held = std::clamp<int64_t>(integer(filled), 0, capacity);
  const int64_t first = oldest + held + (count - kept);
  const at::Tensor rows = dim > 1 && keys.stride(1) != 1 ? keys.contiguous() : keys;
  const char* const from = static_cast<const char*>(rows.const_data_ptr());
  char* const to = static_cast<char*>(queue.mutable_data_ptr());
  const Type from_type = tensors::type_of(rows), to_type = tensors::type_of(queue);
  const int64_t from_stride = rows.stride(0) * rows.element_size(), to_stride = dim * queue.element_size();
  const int64_t items = std::max<int64_t>(kept * dim / kElements, 1), rows_of_item = cpu::divide_up(kept, items);
  cpu::over_items(items, [&](int64_t item) {
    for (int64_t i = item * rows_of_item; i < std::min((item + 1) * rows_of_item, kept); ++i) {
      cpu::write_unit_row(to + (first + i) % capacity * to_stride, to_type, from + (count - kept + i) * from_stride,
                          from_type, dim);
    }
  });
  const int64_t overflow = std::max<int64_t>(held + count - capacity, 0);
  integer(tail) = (oldest + overflow) % capacity;
  integer(filled) = held + count - overflow;
}

void dequeue_cpu(const at::Tensor& tail, const at::Tensor& filled, int64_t capacity, int64_t count) {
  TORCH_CHECK_VALUE(capacity > 0, "capacity is ", capacity);
  const int64_t dropped = std::clamp<int64_t>(integer(filled), 0, count);
  integer(tail) = wrapped(wrapped(integer(tail), capacity) + dropped, capacity);
  integer(filled) -= dropped;
}

}  // namespace fastssl::ops
