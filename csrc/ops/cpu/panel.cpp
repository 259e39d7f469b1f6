// Picks the loops of panel.h for this processor, within what torch was told to use (ATEN_CPU_CAPABILITY).
#include "panel.h"

#include <ATen/Version.h>

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
  if (capability == "AVX512") return __builtin_cpu_supports("avx512bf16") ? avx512_bf16 : avx512;
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
