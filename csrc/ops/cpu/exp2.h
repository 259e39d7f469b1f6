// How 2^x is computed, by every loop and on every instruction set; constants only, for panel_isa.cpp shares no code.
#pragma once

namespace fastssl::cpu {

// Minimax polynomial of 2^f for −½ ≤ f ≤ ½, the highest power first; the constant term is 1. Within 2 units in the last
// place after rounding.
constexpr float kExp2[] = {
    1.5353360e-4f, 1.3398876e-3f, 9.6184374e-3f, 5.5503325e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.f};

// 1.5 · 2^23: adding it leaves the nearest integer in the low bits.
constexpr float kRound = 12582912.f;

// Below 2^kLowest, the smallest normal number, a result is 0.
constexpr float kLowest = -126.f;

}  // namespace fastssl::cpu
