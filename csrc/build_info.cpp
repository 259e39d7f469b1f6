// Answers with the compiler's own macros: what was done, not what was asked for.
#include "build_info.h"

#include <pybind11/stl.h>
#include <torch/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "ops/cpu/panel.h"

#ifdef FASTSSL_WITH_CUDA
#include "cuda/runtime.h"
#endif

namespace py = pybind11;

namespace fastssl {
namespace {

#ifdef __clang__
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// Instruction sets that the compiler may use everywhere, without asking the CPU first.
std::vector<std::string> cpu_flags() {
  return {
#ifdef __AVX2__
      "avx2",
#endif
#ifdef __AVX512F__
      "avx512f",
#endif
#ifdef __ARM_FEATURE_BF16
      "bf16",
#endif
#ifdef __ARM_FEATURE_SVE
      "sve",
#endif
  };
}

std::vector<std::string> split(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

#ifdef FASTSSL_WITH_CUDA
// 13020 is 13.2.
std::string cuda_version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

void add_cuda(py::dict& info) {
  std::vector<std::string> archs;
  for (int arch : cuda::archs()) archs.push_back(std::to_string(arch / 100) + "." + std::to_string(arch % 100 / 10));
  info["cuda"] = cuda_version(cuda::runtime_version());
  info["cuda_archs"] = archs;
  if (const int driver = cuda::driver_version()) info["cuda_driver"] = cuda_version(driver);
}
#endif

}  // namespace

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["cpp_standard"] = __cplusplus / 100 % 100;  // 202002 is C++20
  info["torch"] = TORCH_VERSION;
  info["cpu_flags"] = cpu_flags();
  info["cpu_kernels"] = cpu::panel().name;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;  // at::parallel_for runs on one thread then
#endif
  info["ops"] = split(FASTSSL_OPS);
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
  info["cuda_driver"] = py::none();  // the newest CUDA version that the driver here runs
#ifdef FASTSSL_WITH_CUDA
  add_cuda(info);
#endif
  return info;
}

}  // namespace fastssl
