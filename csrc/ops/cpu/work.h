// How InfoNCE's work is cut up: tiles of keys, splits of the queue, and items that threads take as they come free.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <optional>
#ifdef FASTSSL_STD_THREADS
#include <thread>
#include <vector>
#endif

#include "panel.h"

namespace fastssl::cpu {

constexpr int64_t kItems = 32;  // work items wanted: enough for many cores, few enough that the partials stay small

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys of a tile: an even number, and few enough that tile and logits stay in the second-level cache.
inline int64_t keys_of_tile(int64_t d) { return std::clamp<int64_t>(16384 / d / 2 * 2, 32, 256); }

inline int64_t splits_for(int64_t blocks, int64_t count, int64_t tile) {
  return std::clamp<int64_t>(divide_up(kItems, std::max<int64_t>(blocks, 1)), 1, std::max<int64_t>(count / tile, 1));
}

inline at::Tensor floats(at::IntArrayRef shape) { return at::empty(shape, at::kFloat); }
inline float* data(const at::Tensor& x) { return x.mutable_data_ptr<float>(); }

inline float scalar(double value, const std::optional<at::Tensor>& tensor) {
  return static_cast<float>(tensor ? tensor->item<double>() : value);
}

// at::get_num_threads() and at::parallel_for. With FASTSSL_STD_THREADS, a number, they are that many std::threads,
// because ThreadSanitizer does not understand what orders OpenMP's; torch itself is to have one thread then.
#ifdef FASTSSL_STD_THREADS
inline int64_t threads() { return FASTSSL_STD_THREADS; }

template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  const int64_t length = std::max(divide_up(end - begin, threads()), grain);
  std::vector<std::thread> workers;
  for (int64_t first = begin; first < end; first += length) {
    workers.emplace_back([&work, first, last = std::min(first + length, end)] { work(first, last); });
  }
  for (std::thread& worker : workers) worker.join();
}
#else
inline int64_t threads() { return at::get_num_threads(); }

template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  at::parallel_for(begin, end, grain, work);
}
#endif

// Calls work(item) for every item, each on whichever thread is free: a thread that shares its core does not hold up the
// others.
template <typename Work>
void over_items(int64_t items, const Work& work) {
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(items, threads()), 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView plain_arithmetic;  // a thread does not inherit the caller's
    for (int64_t item = next++; item < items; item = next++) work(item);
  });
}

// Cuts `count` keys into splits of whole tiles and calls work(block, split, begin, end) for each, on any thread.
template <typename Work>
void over_splits(int64_t blocks, int64_t splits, int64_t count, int64_t tile, const Work& work) {
  const int64_t length = divide_up(divide_up(count, tile), splits) * tile;
  over_items(blocks * splits, [&](int64_t item) {
    const int64_t split = item / blocks, from = std::min(split * length, count);
    work(item % blocks, split, from, std::min(from + length, count));
  });
}

}  // namespace fastssl::cpu
