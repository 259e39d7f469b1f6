// The CUDA runtime that the extension was compiled with. Without torch, like everything nvcc compiles here.
#pragma once

#include <vector>

namespace fastssl::cuda {

int runtime_version();     // of the toolkit, 13000 for 13.0
int driver_version();      // the newest CUDA version that the driver runs; 0 without a driver
std::vector<int> archs();  // what nvcc compiled for, 900 for 9.0

}  // namespace fastssl::cuda
