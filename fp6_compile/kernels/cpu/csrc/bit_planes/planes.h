// A weight of any format in canonical planes, layout "planes.v1" (packing.py): what six bits are not packed in.
#pragma once
#include <cstdint>

namespace fp6 {

struct PlanesWeight {
  const uint8_t* planes[3];  // [n, strides[i]]: the low bits' plane first
  int64_t strides[3];        // bytes of a row
  int widths[3];             // bits of a code in each plane, 0 where there is none
  int exponent_bits, mantissa_bits;
  const float* scale;  // [groups, n]
  int64_t n, k;
  int64_t group;  // inputs that share a scale, at most k
};

// out [m, n] = x [m, k] times the weight, transposed: exact values, sums in float32, scaled by group.
void mm(const PlanesWeight&, const float* x, int64_t m, float* out);
// Rows [first, first + count) as [count, k], values times scale, BF16 (rounded once) or float.
void dequantize(const PlanesWeight&, int64_t first, int64_t count, void* out, bool bf16);

}  // namespace fp6
