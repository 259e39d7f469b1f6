// Runs the CPU kernels on std::threads under ThreadSanitizer; CMake builds it with FASTSSL_SANITIZE=thread.
//
// Every thread sees the shapes at which work is split: several panels, several splits of the keys, a ring that wraps.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <thread>
#include <vector>

#include "ops/augment.h"
#include "ops/ema_update.h"
#include "ops/info_nce.h"
#include "ops/key_queue.h"
#include "ops/normalized_mse.h"
#include "tensors/host_buffers.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

struct Shape {
  int64_t n, m, d;
};
constexpr Shape kShapes[] = {{1, 1, 1}, {5, 40, 3}, {70, 700, 31}, {200, 1100, 129}, {300, 90, 64}};

Tensor rows(at::IntArrayRef shape, at::ScalarType dtype) { return at::randn(shape).to(dtype); }

// One of the three modes, forward and backward.
void info_nce(const Tensor& query, const Tensor& key, const Optional& negatives, const Optional& first,
              const Optional& count, bool normalized) {
  for (const bool gradients : {false, true}) {
    const auto outputs =
        fastssl::ops::info_nce_cpu(query, key, negatives, 0.2, std::nullopt, first, count, normalized, gradients);
    const Tensor& lse = std::get<1>(outputs);
    if (!gradients) continue;
    fastssl::ops::info_nce_negatives_cpu(at::ones_like(lse), lse, query, negatives.value_or(key), 0.2, std::nullopt,
                                         first, count, normalized, !negatives);
  }
}

void info_nce_of(const Shape& shape, at::ScalarType dtype) {
  const auto [n, m, d] = shape;
  const Tensor query = rows({n, d}, dtype), key = rows({n, d}, dtype), queue = rows({m, d}, dtype);
  info_nce(query, key, std::nullopt, std::nullopt, std::nullopt, false);
  info_nce(query, key, queue, std::nullopt, std::nullopt, false);
  info_nce(query, key, at::div(queue, queue.norm()), at::scalar_tensor(m - 1, at::kLong),
           at::scalar_tensor(m / 2 + 1, at::kLong), true);
  info_nce(query, key, rows({n, m % 97 + 1, d}, dtype), std::nullopt, std::nullopt, false);
}

void normalized_mse_of(const Shape& shape, at::ScalarType dtype) {
  const Tensor prediction = rows({shape.n, shape.d}, dtype), target = rows({shape.n, shape.d}, dtype);
  for (const bool gradients : {false, true}) fastssl::ops::normalized_mse_cpu(prediction, target, gradients);
}

// More elements than one thread takes at a time.
void ema_update_of(const Shape& shape, at::ScalarType dtype) {
  const std::vector<Tensor> targets{rows({shape.n, shape.m}, at::kFloat), rows({70000 * shape.d}, at::kFloat),
                                    rows({shape.d}, at::kDouble)};
  std::vector<Tensor> sources, shadows;
  for (const Tensor& target : targets) {
    sources.push_back(at::randn_like(target).to(dtype));
    shadows.push_back(at::empty_like(target, target.options().dtype(at::kBFloat16)));
  }
  fastssl::ops::ema_update_cpu(targets, sources, {}, 0.9, std::nullopt);
  fastssl::ops::ema_update_cpu(targets, sources, shadows, 0.1, std::nullopt);
}

// More elements than one thread takes at a time.
void key_queue_of(const Shape& shape, at::ScalarType dtype) {
  const int64_t capacity = shape.m + 100000 / shape.d;
  const Tensor queue = at::zeros({capacity, shape.d}, dtype), tail = at::zeros({}, at::kLong);
  const Tensor filled = at::zeros({}, at::kLong), arrived = at::zeros({}, at::kInt);
  for (const int64_t count : {shape.n, capacity / 2 + 1, 2 * capacity + 3}) {
    fastssl::ops::enqueue_cpu(queue, tail, filled, arrived, rows({count, shape.d}, dtype));
    fastssl::ops::dequeue_cpu(tail, filled, capacity, shape.n / 3);
  }
}

// More images than threads, all steps, with random numbers as parameters and weights.
void augment_of(const Shape& shape, at::ScalarType dtype) {
  const int64_t count = shape.n % 13 + 1, height = shape.m % 64 + 1, width = shape.d % 64 + 1;
  const Tensor images = at::randint(256, {count, height, width, 3}, at::kByte);
  const Tensor out = at::empty({count, 3, height, width}, dtype).contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t rows = std::min<int64_t>(height, 13), columns = std::min<int64_t>(width, 7);
  const std::vector<double> mean{.5, .5, .5}, std{.2, .2, .2};
  for (const std::vector<int64_t>& steps : std::vector<std::vector<int64_t>>{{}, {0, 1, 2, 3, 4}, {4, 2, 0}}) {
    fastssl::ops::augment_cpu(images, out, at::rand({count, 12}) * 20, at::rand({count, rows, rows}),
                              at::rand({count, columns, columns}), steps, mean, std);
  }
}

// Blocks of memory handed from thread to thread.
void host_buffers() {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([thread] {
      for (int round = 0; round < 50; ++round) {
        const Tensor x = fastssl::tensors::empty_reused({1 << 18}, at::TensorOptions(at::kFloat));
        x.fill_(thread);
        TORCH_CHECK(x.min().item<float>() == static_cast<float>(thread), "two threads have one block");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A new op adds a function like these and a line here.
void all_ops(const Shape& shape, at::ScalarType dtype) {
  info_nce_of(shape, dtype);
  normalized_mse_of(shape, dtype);
  ema_update_of(shape, dtype);
  key_queue_of(shape, dtype);
  augment_of(shape, dtype);
}

}  // namespace

int main() try {
  at::set_num_threads(1);  // torch's own loops stay on the thread that calls them
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const Shape& shape : kShapes) all_ops(shape, dtype);
  }
  host_buffers();
  std::puts("done");
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
