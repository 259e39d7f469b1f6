// The momentum update of many tensors in one launch. Their list travels as the kernel's parameter: there is nothing to
// copy, to cache or to wait for, and a captured launch holds its own list.
#include "ema_update_kernel.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace fastssl::ops {
namespace {

// Loads that a thread has under way, 16 bytes of target and up to as many of source each. At 64 registers a thread,
// 1,024 threads of an SM then have up to 128 KiB under way; published bandwidth × assumed latency predicts that about
// 20 KiB are enough on an H100, 45 on a B200.
constexpr int kInFlight = 4;
constexpr int kThreads = 256;
constexpr int kBlocksOfSm = 4;  // what bounds the registers to 64

// Target of one block: one round of loads. ResNet-50 makes some 6,000 blocks, which every GPU shares out evenly.
constexpr int kChunkBytes = kThreads * kInFlight * 16;

__host__ __device__ constexpr int elements_of_chunk(Type target) {
  return kChunkBytes / (target == Type::kDouble ? 8 : target == Type::kFloat ? 4 : 1);
}

// Lies in constant memory, which serves a whole warp at once where all threads read the same place. The first blocks
// are apart from the segments, so that the search stays in the cache.
template <int kCapacity>
struct Table {
  const double* momentum_on_device;
  double momentum;
  std::uint32_t count;
  std::uint32_t first_block[kCapacity];  // of each segment, ascending
  Segment segments[kCapacity];
};

constexpr int capacity_of(int bytes) {
  return (bytes - 24) / static_cast<int>(sizeof(Segment) + sizeof(std::uint32_t));
}

constexpr int kSmallBytes = 4096;    // what any driver takes as parameters
constexpr int kLargeBytes = 32764;   // what newer ones take
constexpr int kLargeDriver = 12010;  // since CUDA 12.1
constexpr int kSmall = capacity_of(kSmallBytes);
constexpr int kLarge = capacity_of(kLargeBytes);
static_assert(sizeof(Table<kSmall>) <= kSmallBytes && sizeof(Table<kLarge>) <= kLargeBytes);

constexpr std::int64_t kMaxBlocks = 0x7fffffff;

// Elements that are loaded and stored at once.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T values[kWidth];
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignof(T) == 0;
}

__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ double value_of(double x) { return x; }
__device__ __forceinline__ float value_of(__half x) { return __half2float(x); }
__device__ __forceinline__ float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ std::uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ std::uint16_t bfloat16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// t + w·(s−t), or s + m·(t−s) where m is the smaller: the ends are exact, whatever the other side is, and so is t = s.
template <typename T>
class Mix {
 public:
  __device__ __forceinline__ explicit Mix(double m)
      : from_target_(static_cast<T>(1 - m) < T(0.5)), weight_(static_cast<T>(from_target_ ? 1 - m : -m)) {}
  __device__ __forceinline__ T operator()(T t, T s) const {
    return std::fma(weight_, weight_ == T(0) ? T(0) : s - t, from_target_ ? t : s);
  }

 private:
  bool from_target_;
  T weight_;
};

// Packs `begin` to `end` of kWidth elements; a shadow holds bits of half or bfloat16.
template <int kWidth, typename Target, typename Source>
__device__ __forceinline__ void update(Target* target, const Source* source, std::uint16_t* shadow, bool shadow_is_half,
                                       int begin, int end, Mix<Target> mix) {
  auto* const targets = reinterpret_cast<Pack<Target, kWidth>*>(target);
  const auto* const sources = reinterpret_cast<const Pack<Source, kWidth>*>(source);
  auto* const shadows = reinterpret_cast<Pack<std::uint16_t, kWidth>*>(shadow);
  for (int first = begin + threadIdx.x; first < end; first += kInFlight * kThreads) {
    Pack<Target, kWidth> t[kInFlight];
    Pack<Source, kWidth> s[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {  // all loads before the first store, which they might alias
      const int i = first + j * kThreads;
      if (i < end) t[j] = targets[i], s[j] = sources[i];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int i = first + j * kThreads;
      if (i >= end) continue;
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        t[j].values[k] = mix(t[j].values[k], static_cast<Target>(value_of(s[j].values[k])));
      targets[i] = t[j];
      if (shadow == nullptr) continue;
      Pack<std::uint16_t, kWidth> bits;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const auto updated = static_cast<float>(t[j].values[k]);  // a double too, as torch rounds it
        bits.values[k] = shadow_is_half ? half_bits(updated) : bfloat16_bits(updated);
      }
      shadows[i] = bits;
    }
  }
}

// The widest type goes 16 bytes at a time and the others as many elements, so that a warp's accesses have no gaps.
template <typename Target, typename Source>
__device__ __forceinline__ void update_chunk(const Segment& segment, std::int64_t begin, int count, double m) {
  constexpr int kWidth = 16 / (sizeof(Target) > sizeof(Source) ? sizeof(Target) : sizeof(Source));
  auto* const target = static_cast<Target*>(segment.target) + begin;
  const auto* const source = static_cast<const Source*>(segment.source) + begin;
  const bool has_shadow = segment.shadow_type != Type::kNone;
  auto* const shadow = has_shadow ? static_cast<std::uint16_t*>(segment.shadow) + begin : nullptr;
  const bool shadow_is_half = segment.shadow_type == Type::kHalf;
  const Mix<Target> mix(m);
  const bool aligned = is_aligned<Pack<Target, kWidth>>(target) && is_aligned<Pack<Source, kWidth>>(source) &&
                       is_aligned<Pack<std::uint16_t, kWidth>>(shadow);
  const int packs = aligned ? count / kWidth : 0;
  update<kWidth>(target, source, shadow, shadow_is_half, 0, packs, mix);
  update<1>(target, source, shadow, shadow_is_half, packs * kWidth, count, mix);
}

template <typename Target>
__device__ __forceinline__ void update_chunk(const Segment& segment, std::int64_t begin, int count, double m) {
  switch (segment.source_type) {
    case Type::kFloat:
      return update_chunk<Target, float>(segment, begin, count, m);
    case Type::kDouble:
      return update_chunk<Target, double>(segment, begin, count, m);
    case Type::kHalf:
      return update_chunk<Target, __half>(segment, begin, count, m);
    default:
      return update_chunk<Target, __nv_bfloat16>(segment, begin, count, m);
  }
}

// Words `begin` to `end`.
template <typename Word>
__device__ __forceinline__ void copy(std::uint8_t* target, const std::uint8_t* source, std::uint8_t* shadow, int begin,
                                     int end) {
  auto* const targets = reinterpret_cast<Word*>(target);
  const auto* const sources = reinterpret_cast<const Word*>(source);
  auto* const shadows = reinterpret_cast<Word*>(shadow);
  for (int first = begin + threadIdx.x; first < end; first += kInFlight * kThreads) {
    Word words[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int i = first + j * kThreads;
      if (i < end) words[j] = sources[i];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int i = first + j * kThreads;
      if (i >= end) continue;
      targets[i] = words[j];
      if (shadow != nullptr) shadows[i] = words[j];
    }
  }
}

__device__ __forceinline__ void copy_chunk(const Segment& segment, std::int64_t begin, int count) {
  auto* const target = static_cast<std::uint8_t*>(segment.target) + begin;
  const auto* const source = static_cast<const std::uint8_t*>(segment.source) + begin;
  const bool has_shadow = segment.shadow_type != Type::kNone;
  auto* const shadow = has_shadow ? static_cast<std::uint8_t*>(segment.shadow) + begin : nullptr;
  const bool aligned = is_aligned<uint4>(target) && is_aligned<uint4>(source) && is_aligned<uint4>(shadow);
  const int words = aligned ? count / 16 : 0;
  copy<uint4>(target, source, shadow, 0, words);
  copy<std::uint8_t>(target, source, shadow, words * 16, count);
}

// A block does one chunk of one segment; every branch on the segment is the same for all its threads.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    ema_update_kernel(const __grid_constant__ Table<kCapacity> table) {
  std::uint32_t index = 0;
  for (std::uint32_t end = table.count; end - index > 1;) {
    const std::uint32_t middle = (index + end) / 2;
    (table.first_block[middle] <= blockIdx.x ? index : end) = middle;
  }
  const Segment& segment = table.segments[index];
  const int chunk = elements_of_chunk(segment.target_type);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x - table.first_block[index]) * chunk;
  const std::int64_t rest = segment.count - begin;
  const int count = rest < chunk ? static_cast<int>(rest) : chunk;
  if (segment.target_type == Type::kBytes) return copy_chunk(segment, begin, count);
  const double m = table.momentum_on_device == nullptr ? table.momentum : *table.momentum_on_device;
  if (segment.target_type == Type::kFloat) return update_chunk<float>(segment, begin, count, m);
  update_chunk<double>(segment, begin, count, m);
}

// As few launches as tables of this capacity allow.
template <int kCapacity>
cudaError_t launch(const Segment* segments, std::size_t count, double momentum, const double* momentum_on_device,
                   cudaStream_t stream) {
  Table<kCapacity> table;
  table.momentum = momentum;
  table.momentum_on_device = momentum_on_device;
  for (const Segment *next = segments, *const end = segments + count; next != end;) {
    std::int64_t grid = 0;
    for (table.count = 0; next != end && table.count < kCapacity; ++next) {
      if (next->count == 0) continue;
      const std::int64_t blocks = (next->count - 1) / elements_of_chunk(next->target_type) + 1;
      if (blocks > kMaxBlocks) return cudaErrorInvalidValue;
      if (grid + blocks > kMaxBlocks) break;
      table.first_block[table.count] = static_cast<std::uint32_t>(grid);
      table.segments[table.count++] = *next;
      grid += blocks;
    }
    if (grid == 0) break;  // nothing but empty segments was left
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, ema_update_kernel<kCapacity>, table);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t ema_update_launch(const Segment* segments, std::size_t count, double momentum,
                              const double* momentum_on_device, cudaStream_t stream) {
  int driver = 0;
  const cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return error;
  const auto launch_all = count > kSmall && driver >= kLargeDriver ? launch<kLarge> : launch<kSmall>;
  return launch_all(segments, count, momentum, momentum_on_device, stream);
}

}  // namespace fastssl::ops
