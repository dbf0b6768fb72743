// The bits of a float, and back. In an unnamed namespace: each vector path has its own flags.
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
}  // namespace
