// Picks the loops of pixels.h for the instruction set that panel.cpp has chosen.
#include "pixels.h"

#include <string_view>

#include "panel.h"

namespace fastssl::cpu {
namespace pixels_for {

extern const Pixels baseline;
#ifdef FASTSSL_X86
extern const Pixels avx2, avx512, avx512_bf16;
#endif

}  // namespace pixels_for

namespace {

const Pixels& choose() {
#ifdef FASTSSL_X86
  const std::string_view name = panel().name;
  if (name == "avx512_bf16") return pixels_for::avx512_bf16;
  if (name == "avx512") return pixels_for::avx512;
  if (name == "avx2") return pixels_for::avx2;
#endif
  return pixels_for::baseline;
}

}  // namespace

const Pixels& pixels() {
  static const Pixels& chosen = choose();
  return chosen;
}

}  // namespace fastssl::cpu
