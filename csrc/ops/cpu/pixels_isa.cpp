// The loops of pixels.h for one instruction set; CMake compiles this file once for each, with FASTSSL_ISA as its name.
//
// Sums of products are rounded twice, as in PyTorch (CMake forbids the compiler to fuse them here): a result just below
// a whole number would be cut off on the other side. Those of the blur are `fused`.
//
// Nothing from the standard library is used but its types: a function that the linker could share with code for an
// older processor must not be compiled here.
#include <cstdint>
#include <utility>

#include "pixels.h"
#include "registers.h"

namespace fastssl::cpu {
namespace {

using ops::Type;

// Vectors of pixels that go through a chain together, because each waits for itself. There are 32 registers.
#ifdef __AVX512F__
constexpr int kGroups = 4;
#else
constexpr int kGroups = 1;
#endif
constexpr int kStep = kGroups * kLanes;

FASTSSL_INLINE Floats within(const Floats& x, float top) { return smaller(larger(x, Floats{}), all(top)); }  // NaN: 0
FASTSSL_INLINE Floats whole(const Floats& x) { return cut(within(x, 255.f)); }

// Lanes I… of a and b side by side.
template <int... I>
FASTSSL_INLINE Floats pick(const Floats& a, [[maybe_unused]] const Floats& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Ints{I...});
#endif
}

// Lane l of result c is value 3l + c of the three vectors; value i of them is lane i/3 of plane i%3 on the way back.
template <int C, int... L>
FASTSSL_INLINE Floats plane(const Floats (&x)[3], std::integer_sequence<int, L...>) {
  const Floats first = pick<(3 * L + C < 2 * kLanes ? 3 * L + C : 0)...>(x[0], x[1]);
  return pick<(3 * L + C < 2 * kLanes ? L : 3 * L + C - kLanes)...>(first, x[2]);
}

template <int V, int... L>
FASTSSL_INLINE Floats mixed(const Floats (&plane)[3], std::integer_sequence<int, L...>) {
  const Floats first = pick<((V * kLanes + L) / 3 + (V * kLanes + L) % 3 % 2 * kLanes)...>(plane[0], plane[1]);
  return pick<((V * kLanes + L) % 3 < 2 ? L : kLanes + (V * kLanes + L) / 3)...>(first, plane[2]);
}

constexpr std::make_integer_sequence<int, kLanes> kEach{};

// --- reading and writing --------------------------------------------------------------------------------------------

// kLanes pixels: a plane a channel, or three vectors as they lie in memory.
struct Group {
  Floats x[3];
};

template <bool kPlanes>
FASTSSL_INLINE Group read(const uint8_t* from) {
  const Floats x[3] = {load(from), load(from + kLanes), load(from + 2 * kLanes)};
  if constexpr (kPlanes) return {plane<0>(x, kEach), plane<1>(x, kEach), plane<2>(x, kEach)};
  return {x[0], x[1], x[2]};
}

template <bool kPlanes, typename To>
FASTSSL_INLINE void write(const Group& group, const Group& scale, const Group& offset, To* to) {
  Floats x[3];
  for (int c = 0; c < 3; ++c) x[c] = group.x[c] * scale.x[c] + offset.x[c];
  if constexpr (kPlanes) {
    store(to, mixed<0>(x, kEach));
    store(to + kLanes, mixed<1>(x, kEach));
    store(to + 2 * kLanes, mixed<2>(x, kEach));
  } else {
    for (int c = 0; c < 3; ++c) store(to + c * kLanes, x[c]);
  }
}

// A number for each channel where its values are.
template <bool kPlanes>
FASTSSL_INLINE Group numbers(const float (&of)[3]) {
  Group group;
  for (int c = 0; c < 3; ++c) {
    for (int l = 0; l < kLanes; ++l) group.x[c][l] = of[kPlanes ? c : (c * kLanes + l) % 3];
  }
  return group;
}

// --- changes --------------------------------------------------------------------------------------------------------

FASTSSL_INLINE Floats luma_of(const Group& p) { return cut(p.x[0] * 0.2989f + p.x[1] * 0.587f + p.x[2] * 0.114f); }

// In HSV; value and chroma stay. The hue is 0 at red, 2 at green, 4 (-2) at blue; a channel has the full value within 1
// of its own place, the lowest one from 2 on.
FASTSSL_INLINE void turn(Group& p, float by) {
  const Floats r = p.x[0], g = p.x[1], b = p.x[2];
  const Floats value = larger(larger(r, g), b), chroma = value - smaller(smaller(r, g), b);
  const auto is_red = value == r, is_green = value == g;
  const Floats difference = is_red ? g - b : (is_green ? b - r : r - g);
  const Floats place = is_red ? all(by) : (is_green ? all(by + 2.f) : all(by + 4.f));
  Floats hue = difference / (chroma > 0.f ? chroma : all(1.f)) + place;  // -4…8
  hue -= hue >= 3.f ? all(6.f) : Floats{};
  hue += hue < -3.f ? all(6.f) : Floats{};
  const Floats from_red = magnitude(hue), from_green = magnitude(hue - 2.f), from_blue = magnitude(hue + 2.f);
  const Floats missing[3] = {from_red - 1.f, smaller(from_green - 1.f, 5.f - from_green),
                             smaller(from_blue - 1.f, 5.f - from_blue)};
  constexpr float kScale = 255.999f / 255;  // torchvision's way from 0…1 to 0…255
  for (int c = 0; c < 3; ++c) p.x[c] = cut((value - chroma * within(missing[c], 1.f)) * kScale);
}

FASTSSL_INLINE void apply(const ChangeOf& what, Group& p) {
  switch (what.change) {
    case Change::kBlend:
      for (Floats& x : p.x) x = whole(x * what.a + what.b);
      return;
    case Change::kSaturate: {
      const Floats luma = luma_of(p) * what.b;
      for (Floats& x : p.x) x = whole(x * what.a + luma);
      return;
    }
    case Change::kTurn:
      return turn(p, what.a);
    case Change::kGray: {
      const Floats luma = luma_of(p);
      for (Floats& x : p.x) x = luma;
      return;
    }
    case Change::kSolarize:
      for (Floats& x : p.x) x = x >= what.a ? 255.f - x : x;
      return;
    case Change::kErase:
      for (Floats& x : p.x) x = Floats{};
      return;
  }
}

template <bool kPlanes>
FASTSSL_INLINE void changed(const Chain& chain, const uint8_t* from, Group (&groups)[kGroups]) {
  for (int g = 0; g < kGroups; ++g) groups[g] = read<kPlanes>(from + g * 3 * kLanes);
  for (int i = 0; i < chain.length; ++i) {
    const ChangeOf& what = chain.changes[i];
    for (Group& group : groups) apply(what, group);
  }
}

template <bool kPlanes, typename To>
void convert_as(const Chain& chain, const Affine& affine, const uint8_t* from, To* to, int64_t count) {
  const Group scale = numbers<kPlanes>(affine.scale), offset = numbers<kPlanes>(affine.offset);
  const auto step = [&](const uint8_t* in, To* out) {
    Group groups[kGroups];
    changed<kPlanes>(chain, in, groups);
    for (int g = 0; g < kGroups; ++g) write<kPlanes>(groups[g], scale, offset, out + g * 3 * kLanes);
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) step(from + 3 * i, to + 3 * i);
  if (i == count) return;
  uint8_t in[3 * kStep] = {};
  To out[3 * kStep];
  __builtin_memcpy(in, from + 3 * i, 3 * (count - i));
  step(in, out);
  __builtin_memcpy(to + 3 * i, out, 3 * (count - i) * sizeof(To));
}

template <typename To>
void convert_to(const Chain& chain, const Affine& affine, const uint8_t* from, void* to, int64_t count) {
  bool planes = false;
  for (int i = 0; i < chain.length; ++i) {
    const Change change = chain.changes[i].change;
    planes |= change == Change::kSaturate || change == Change::kTurn || change == Change::kGray;
  }
  if (planes) {
    convert_as<true>(chain, affine, from, static_cast<To*>(to), count);
  } else {
    convert_as<false>(chain, affine, from, static_cast<To*>(to), count);
  }
}

void convert(const Chain& chain, const Affine& affine, const uint8_t* from, void* to, Type to_type, int64_t count) {
  switch (to_type) {
    case Type::kBytes:
      return convert_to<uint8_t>(chain, affine, from, to, count);
    case Type::kHalf:
      return convert_to<Half>(chain, affine, from, to, count);
    case Type::kBFloat16:
      return convert_to<BFloat16>(chain, affine, from, to, count);
    default:
      return convert_to<float>(chain, affine, from, to, count);
  }
}

// --- mean luma ------------------------------------------------------------------------------------------------------

double luma(const Chain& chain, const uint8_t* from, int64_t count) {
  constexpr int64_t kBlock = 256 * kStep;  // summed in float, which is exact
  Floats lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = static_cast<float>(l);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    Floats sum{};
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) {
      Group groups[kGroups];
      changed<true>(chain, from + 3 * i, groups);
      for (const Group& group : groups) sum += luma_of(group);
    }
    if (i < end) {
      uint8_t in[3 * kStep] = {};
      __builtin_memcpy(in, from + 3 * i, 3 * (end - i));
      Group groups[kGroups];
      changed<true>(chain, in, groups);
      for (int g = 0; g < kGroups; ++g) {
        const float rest = static_cast<float>(end - i - g * kLanes);
        sum += lane < rest ? luma_of(groups[g]) : Floats{};
      }
    }
    for (int l = 0; l < kLanes; ++l) total += sum[l];
  }
  return total;
}

// --- weighted sums --------------------------------------------------------------------------------------------------

FASTSSL_INLINE void put(float* to, const Floats& sum) { store(to, sum); }
FASTSSL_INLINE void put(uint8_t* to, const Floats& sum) { store(to, within(sum + 0.5f, 255.f)); }

// V vectors; `at(t)` is where term t of the sum begins.
template <int V, typename At, typename To>
FASTSSL_INLINE void sum(const At& at, const float* taps, int64_t count, To* to) {
  Floats sums[V] = {};
  for (int64_t t = 0; t < count; ++t) {
    const float* const from = at(t);
    for (int v = 0; v < V; ++v) sums[v] = fused(load(from + v * kLanes), all(taps[t]), sums[v]);
  }
  for (int v = 0; v < V; ++v) put(to + v * kLanes, sums[v]);
}

// Whole vectors from 0 on until `length` is covered; `at(t, i)` is element i of term t.
template <typename At, typename To>
FASTSSL_INLINE void sums(const At& at, const float* taps, int64_t count, int64_t length, To* to) {
  int64_t i = 0;
  const auto from = [&](int64_t t) { return at(t, i); };
  for (; i + 7 * kLanes < length; i += 8 * kLanes) sum<8>(from, taps, count, to + i);
  for (; i + 3 * kLanes < length; i += 4 * kLanes) sum<4>(from, taps, count, to + i);
  for (; i < length; i += kLanes) sum<1>(from, taps, count, to + i);
}

void sum_lines(const float* const* from, const float* taps, int64_t count, int64_t begin, int64_t end, uint8_t* to) {
  const auto at = [&](int64_t t, int64_t i) { return from[t] + begin + i; };
  const int64_t length = end - begin, rest = length / kLanes * kLanes;
  sums(at, taps, count, rest, to);
  if (rest == length) return;
  uint8_t last[kLanes];
  sum<1>([&](int64_t t) { return at(t, rest); }, taps, count, last);
  __builtin_memcpy(to + rest, last, length - rest);
}

void slide(const float* from, const float* taps, int64_t count, int64_t length, float* to) {
  sums([&](int64_t t, int64_t i) { return from + i + 3 * t; }, taps, count, length, to);
}

// Channels of the first pixel, again and again from channel V·kLanes % 3 on.
template <int V, int... L>
FASTSSL_INLINE Floats repeated(const Floats& x, std::integer_sequence<int, L...>) {
  return pick<((V * kLanes + L) % 3)...>(x, x);
}

void spread(const float* from, const float* weights, int64_t stride, int64_t count, int64_t length, float* to) {
  for (int64_t i = 0; i < length; i += 3 * kLanes) {
    Floats sums[3] = {};
    for (int64_t t = 0; t < count; ++t) {
      const Floats x = load(from + 3 * t);
      const float* const weight = weights + t * stride + i;
      sums[0] = fused(repeated<0>(x, kEach), load(weight), sums[0]);
      sums[1] = fused(repeated<1>(x, kEach), load(weight + kLanes), sums[1]);
      sums[2] = fused(repeated<2>(x, kEach), load(weight + 2 * kLanes), sums[2]);
    }
    for (int v = 0; v < 3; ++v) store(to + i + v * kLanes, sums[v]);
  }
}

}  // namespace

namespace pixels_for {

extern const Pixels FASTSSL_ISA;
const Pixels FASTSSL_ISA = {convert, luma, sum_lines, slide, spread};

}  // namespace pixels_for
}  // namespace fastssl::cpu
