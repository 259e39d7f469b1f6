// One tensor of a momentum update as flat memory: what the CPU kernel and the CUDA kernel take. Without torch, C++17.
#pragma once

#include <cstdint>

namespace fastssl::ops {

enum class Type : std::uint8_t { kNone, kBytes, kFloat, kDouble, kHalf, kBFloat16 };

// target ← m·target + (1−m)·source, and shadow ← the new target in its own type. A target of kBytes is copied.
struct Segment {
  void* target;
  const void* source;
  void* shadow;        // may be null: shadow_type is kNone then
  std::int64_t count;  // elements; bytes where the target is kBytes
  Type target_type;    // kFloat, kDouble or kBytes
  Type source_type;    // kFloat, kDouble, kHalf or kBFloat16; kBytes where the target is
  Type shadow_type;    // kNone, kHalf or kBFloat16; kBytes where the target is
};

}  // namespace fastssl::ops
