// As much of CUDA as the kernels of csrc/ use, on the CPU: a compiler that knows no CUDA builds and runs them
// unchanged, under sanitizers. One-dimensional grids, no shared memory, no barriers, and every launch has ended when it
// returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// What a test sets and reads.
namespace cuda_on_cpu {

struct Launch {
  unsigned blocks;
  std::size_t parameter_bytes;
};

inline int driver_version = 13000;
inline std::uint64_t first_block = 0;  // the blocks before it are not run: for grids that would take hours
inline std::vector<Launch> launches;   // those that were not refused

template <typename... Parameters>
constexpr std::size_t bytes_of_parameters() {
  std::size_t bytes = 0;
  ((bytes = (bytes + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)), ...);
  return bytes;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = cuda_on_cpu::driver_version;
  return cudaSuccess;
}

// The threads of a block are threads, which walk through the grid without waiting for each other: to ThreadSanitizer
// all that they do is concurrent. From block to block they change places, else those of equal index would be one
// thread.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "CUDA copies parameters byte by byte");
  constexpr std::size_t parameter_bytes = cuda_on_cpu::bytes_of_parameters<Parameters...>();
  static_assert(parameter_bytes <= 32764, "nvcc refuses this kernel");
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y != 1 || grid.z != 1 || block.x == 0 || block.x > 1024 ||
      block.y != 1 || block.z != 1 || config->dynamicSmemBytes != 0 || config->numAttrs != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (parameter_bytes > 4096 && cuda_on_cpu::driver_version < 12010) return cudaErrorNotSupported;
  cuda_on_cpu::launches.push_back({grid.x, parameter_bytes});
  if (cuda_on_cpu::first_block >= grid.x) return cudaSuccess;
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < block.x; ++thread) {
    // Without the attribute, ThreadSanitizer spends its time on the copies of the parameters.
    threads.emplace_back([&, thread]() __attribute__((no_sanitize_thread)) {
      gridDim = grid;
      blockDim = block;
      for (unsigned b = static_cast<unsigned>(cuda_on_cpu::first_block); b < grid.x; ++b) {
        blockIdx.x = b;
        threadIdx.x = (thread + b) % block.x;
        kernel(arguments...);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}
