// The arithmetic of the momentum update on a part of a tensor.
#pragma once

#include <cstdint>

#include "../ema_segment.h"

namespace fastssl::cpu {

// Updates the elements begin…end−1 of a segment with momentum m.
void ema_chunk(const ops::Segment& segment, int64_t begin, int64_t end, double m);

}  // namespace fastssl::cpu
