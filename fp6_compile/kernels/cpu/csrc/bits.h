// The bits of a float, and back, and its BF16. In an unnamed namespace: each vector path has its own flags.
#pragma once
#include <cstdint>
#include <cstring>

namespace {
inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t bf16_of(float f) {
  const uint32_t bits = bits_of(f);
  const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
  return static_cast<uint16_t>((f != f ? bits | 0x400000 : rounded) >> 16);
}
}  // namespace
