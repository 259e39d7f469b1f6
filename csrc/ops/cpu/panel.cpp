// Picks the loops of panel.h for this processor, within what torch was told to use (ATEN_CPU_CAPABILITY).
#include "panel.h"

#include <ATen/Version.h>

#include <cstdlib>
#include <string>

namespace fastssl::cpu {

extern const Panel baseline;
#ifdef FASTSSL_X86
extern const Panel avx2, avx512, avx512_bf16;
#endif

namespace {

const Panel& choose() {
#ifdef FASTSSL_X86
  const std::string capability = at::get_cpu_capability();
  const char* const half = std::getenv("FASTSSL_AVX512_BF16");  // "0" leaves these instructions out, for tests
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && !(half && std::string(half) == "0");
  if (capability == "AVX512") return bf16 ? avx512_bf16 : avx512;
  if (capability == "AVX2") return avx2;
#endif
  return baseline;
}

}  // namespace

const Panel& panel() {
  static const Panel& chosen = choose();
  return chosen;
}

}  // namespace fastssl::cpu
