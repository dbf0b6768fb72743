// Values to codes: Format.encode of formats.py, by rows and groups of inputs.
#pragma once
#include "bits.h"
#include "fp6.h"

#if defined(FP6_X86) && defined(__linux__) && !defined(FP6_WITHOUT_TORCH)  // clones are resolved before sanitizers are up
#define FP6_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define FP6_CLONES
#endif

namespace {
constexpr uint32_t kMagnitude = 0x7FFFFFFF;
constexpr uint32_t kInfinity = 0x7F800000;

// A format.
struct Codes {
  int exponent_bits, mantissa_bits;
};

// in / scale, rounded once. With fused multiply-adds it is the quotient by the inverse and one correction (Markstein, IBM J.
// Res. Dev. 34, 1990): right unless the scale's mantissa is all ones or something underflows, see `invertible`.
template <bool kInvert>
inline float quotient(float in, float scale, float inverse) {
  if constexpr (!kInvert) return in / scale;
  const float q = in * inverse;
  return __builtin_fmaf(__builtin_fmaf(-q, scale, in), inverse, q);
}

inline bool invertible(float scale) {
  return (bits_of(scale) & 0x7FFFFF) != 0x7FFFFF && scale > 0x1p-60f && scale < 0x1p60f;
}

// The nearest codes of in / scale: Format.encode in formats.py, which says why.
template <bool kInvert>
inline __attribute__((always_inline)) void encode(const float* in, int64_t count, float scale, Codes of, uint8_t* out) {
  const int bias = (1 << (of.exponent_bits - 1)) - 1, bits = 1 + of.exponent_bits + of.mantissa_bits;
  const int up = 23 - of.mantissa_bits;
  const int32_t low = 128 - bias, magic_add = (up << 23) + (1 << 22), most = (1 << (bits - 1)) - 1;
  const float inverse = 1 / scale;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t value = bits_of(quotient<kInvert>(in[i], scale, inverse)), magnitude = value & kMagnitude;
    int32_t power = static_cast<int32_t>(magnitude & kInfinity);
    power = power < low << 23 ? low << 23 : power;
    const int32_t magic = power + magic_add;
    const int32_t sum = static_cast<int32_t>(bits_of(float_of(magnitude) + float_of(magic)));
    const int32_t code = sum - magic + (power >> up) - (low << of.mantissa_bits);
    out[i] = static_cast<uint8_t>((code < most ? code : most) | (bits_of(in[i]) >> 31) << (bits - 1));
  }
}

// A row's codes by groups of inputs, whose scales are `ld` apart.
struct Row {
  const float* in;
  int64_t k, group;
  const float* scale;
  int64_t ld;
};

template <bool kInvert>
inline __attribute__((always_inline)) void encode_groups(const Row& row, Codes of, uint8_t* out) {
  for (int64_t from = 0, g = 0; from < row.k; from += row.group, g++) {
    const int64_t count = from + row.group < row.k ? row.group : row.k - from;
    const float scale = row.scale[g * row.ld];
    if (scale != scale) continue;  // of values that are not finite
    if (kInvert && invertible(scale))
      encode<kInvert>(row.in + from, count, scale, of, out + from);
    else
      encode<false>(row.in + from, count, scale, of, out + from);
  }
}

FP6_CLONES void encode_anywhere(const Row& row, Codes of, uint8_t* out) { encode_groups<false>(row, of, out); }

#ifdef FP6_X86
__attribute__((target("avx512f,avx512bw,avx512vl,fma"))) void encode_avx512(const Row& row, Codes of, uint8_t* out) {
  encode_groups<true>(row, of, out);
}

void encode(const Row& row, Codes of, uint8_t* out) {
  static const bool supported = fp6::paths() & 4 && __builtin_cpu_supports("avx512vl");
  (supported ? encode_avx512 : encode_anywhere)(row, of, out);
}
#else
constexpr auto encode = encode_anywhere;
#endif

}  // namespace
