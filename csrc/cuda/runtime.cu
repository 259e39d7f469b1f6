// The CUDA runtime that the extension was compiled with.
#include "runtime.h"

#include <cuda_runtime_api.h>

namespace fastssl::cuda {

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::vector<int> archs() { return {__CUDA_ARCH_LIST__}; }

}  // namespace fastssl::cuda
