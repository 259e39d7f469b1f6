// A row of any floating type, written with length 1 in another.
#pragma once

#include <cstdint>

#include "../ema_segment.h"

namespace fastssl::cpu {

// to ← from/max(‖from‖, 1e-12), in float arithmetic; kFloat, kHalf and kBFloat16 are taken.
void write_unit_row(void* to, ops::Type to_type, const void* from, ops::Type from_type, int64_t count);

}  // namespace fastssl::cpu
