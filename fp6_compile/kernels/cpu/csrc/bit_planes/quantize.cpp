// Weights to tiles ("cpu.v1") and scales in one pass, and tiles to canonical planes and back. The same bits as quantize.py
// and packing.py give.
//
// Loops that compilers vectorize, one clone for each instruction set, chosen when the library is loaded.
#include <memory>

#include "bits.h"
#include "bit_planes/encode.h"
#include "fp6.h"
#include "parallel.h"

#ifdef FP6_X86
#include <immintrin.h>
#endif

#define FP6_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
using namespace fp6;

constexpr int64_t kWorthAThread = 1 << 16;  // weights
constexpr float kTiny = 1.17549435e-38f;  // the smallest normal number

// An FP16 as a float: its exponent moves up by 112, and a subnormal loses the implicit one that this gives it. Infinities
// and NaN come out as numbers from 2^16 on.
inline float float_of_half(uint16_t half) {
  const uint32_t magnitude = (half & 0x7FFFu) << 13, sign = (half & 0x8000u) << 16;
  const float normal = float_of(magnitude + (112u << 23));
  const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  return float_of(bits_of((half & 0x7C00) ? normal : subnormal) | sign);
}

FP6_CLONES void floats_of_halves_portable(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) out[i] = float_of_half(in[i]);
}

#ifdef FP6_X86
__attribute__((target("avx,f16c"))) void floats_of_halves(const uint16_t* in, int64_t count, float* out) {
  static const bool supported = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
  int64_t i = 0;
  for (; supported && i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  floats_of_halves_portable(in + i, count - i, out + i);
}
#else
constexpr auto floats_of_halves = floats_of_halves_portable;
#endif

FP6_CLONES void floats_of_bf16(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) out[i] = float_of(static_cast<uint32_t>(in[i]) << 16);
}

// The largest magnitude, as bits: they are ordered as the floats are, and NaN comes after infinity.
FP6_CLONES uint16_t largest(const uint16_t* in, int64_t count) {
  uint16_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint16_t magnitude = in[i] & 0x7FFF;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

FP6_CLONES uint32_t largest(const uint32_t* in, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t magnitude = in[i] & kMagnitude;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

// A tile of codes, [4][kTile], as the three vectors of the layout: a and b in w4, c in w2.
FP6_CLONES void tile_of(const uint8_t* codes, int64_t ld, uint8_t* ab, uint8_t* c) {
  uint8_t rows[kRows][kTile];
  for (int r = 0; r < kRows; r++)
    for (int l = 0; l < 4; l++)
      for (int h = 0; h < 2; h++) std::memcpy(rows[r] + 16 * l + 8 * h, codes + r * ld + kHalf * h + 8 * l, 8);
  for (int i = 0; i < kTile; i++) {
    const uint8_t last = rows[3][i];
    ab[i] = rows[0][i] | last << 6;
    ab[kTile + i] = rows[1][i] | last >> 2 << 6;
    c[i] = rows[2][i] | last >> 4 << 6;
  }
}

// Its inverse.
FP6_CLONES void codes_of(const uint8_t* ab, const uint8_t* c, uint8_t* codes, int64_t ld) {
  uint8_t rows[kRows][kTile];
  for (int i = 0; i < kTile; i++) {
    rows[0][i] = ab[i] & 63;
    rows[1][i] = ab[kTile + i] & 63;
    rows[2][i] = c[i] & 63;
    rows[3][i] = ab[i] >> 6 | ab[kTile + i] >> 6 << 2 | c[i] >> 6 << 4;
  }
  for (int r = 0; r < kRows; r++)
    for (int l = 0; l < 4; l++)
      for (int h = 0; h < 2; h++) std::memcpy(codes + r * ld + kHalf * h + 8 * l, rows[r] + 16 * l + 8 * h, 8);
}

// A row of codes from its planes, and back; `fours` are bytes of w2, four codes each.
FP6_CLONES void codes_of_planes(const uint8_t* w4, const uint8_t* w2, int64_t fours, uint8_t* codes) {
  for (int64_t i = 0; i < fours; i++) {
    const uint8_t a = w4[2 * i], b = w4[2 * i + 1], high = w2[i];
    codes[4 * i] = (a & 15) | (high << 4 & 48);
    codes[4 * i + 1] = a >> 4 | (high << 2 & 48);
    codes[4 * i + 2] = (b & 15) | (high & 48);
    codes[4 * i + 3] = b >> 4 | (high >> 2 & 48);
  }
}

FP6_CLONES void planes_of_codes(const uint8_t* codes, int64_t fours, uint8_t* w4, uint8_t* w2) {
  for (int64_t i = 0; i < fours; i++) {
    const uint8_t* c = codes + 4 * i;
    w4[2 * i] = (c[0] & 15) | c[1] << 4;
    w4[2 * i + 1] = (c[2] & 15) | c[3] << 4;
    w2[i] = c[0] >> 4 | c[1] >> 4 << 2 | c[2] >> 4 << 4 | c[3] >> 4 << 6;
  }
}

enum Dtype : int { kHalfs, kBf16s, kFloats };

struct Source {
  const char* data;
  int dtype;
  int64_t stride;  // of rows, in values

  // Row `row` as floats, in `buffer` or where it is.
  const float* row(int64_t row, int64_t k, float* buffer) const {
    const void* at = address(row, 0);
    if (dtype == kFloats) return static_cast<const float*>(at);
    if (dtype == kHalfs) floats_of_halves(static_cast<const uint16_t*>(at), k, buffer);
    if (dtype == kBf16s) floats_of_bf16(static_cast<const uint16_t*>(at), k, buffer);
    return buffer;
  }
  // The largest magnitude of some inputs, as the bits of a float; from 2^16 on, of halfs that are not finite.
  uint32_t most(int64_t row, int64_t from, int64_t count) const {
    const void* at = address(row, from);
    if (dtype == kFloats) return largest(static_cast<const uint32_t*>(at), count);
    const uint16_t bits = largest(static_cast<const uint16_t*>(at), count);
    return dtype == kHalfs ? bits_of(float_of_half(bits)) : uint32_t{bits} << 16;
  }

 private:
  const void* address(int64_t row, int64_t from) const {
    return data + (row * stride + from) * (dtype == kFloats ? 4 : 2);
  }
};

}  // namespace

// Codes of a weight [n, k] by groups of inputs, in w4 [n/4, k/64, 2, 64] and w2 [n/4, k/64, 64], and scale [groups, n]: NaN
// for a group that has values which are not finite.
FP6_EXPORT void fp6_quantize(const void* weight, int dtype, int64_t stride, int64_t n, int64_t k, int64_t group,
                             int exponent_bits, int mantissa_bits, float max, uint8_t* w4, uint8_t* w2, float* scale) {
  const Source source{static_cast<const char*>(weight), dtype, stride};
  const Codes of{exponent_bits, mantissa_bits};
  const int64_t tiles = (k + kTile - 1) / kTile, ld = tiles * kTile;
  const uint32_t beyond = dtype == kHalfs ? bits_of(65536.0f) : kInfinity;
  at::parallel_for(0, (n + kRows - 1) / kRows, 1 + kWorthAThread / (kRows * k), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> floats(new float[k]);
    const std::unique_ptr<uint8_t[]> codes(new uint8_t[kRows * ld]());
    for (int64_t strip = begin; strip < end; strip++) {
      for (int64_t r = 0; r < kRows; r++) {
        const int64_t row = strip * kRows + r;
        if (row >= n) {
          std::memset(codes.get() + r * ld, 0, ld);
          continue;
        }
        for (int64_t from = 0, g = 0; from < k; from += group, g++) {
          const int64_t count = from + group < k ? group : k - from;
          const uint32_t most = source.most(row, from, count);
          const float of_max = float_of(most) / max, s = most == 0 ? 1.0f : of_max < kTiny ? kTiny : of_max;
          scale[g * n + row] = most >= beyond ? float_of(kInfinity + 1) : s;
        }
        encode({source.row(row, k, floats.get()), k, group, scale + row, n}, of, codes.get() + r * ld);
      }
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t at = strip * tiles + tile;
        tile_of(codes.get() + tile * kTile, ld, w4 + at * 2 * kTile, w2 + at * kTile);
      }
    }
  });
}

// Canonical planes p4 [n, 2 fours] and p2 [n, fours] of k inputs, to tiles or, if `back`, from tiles.
FP6_EXPORT void fp6_repack(int back, int64_t n, int64_t k, uint8_t* p4, uint8_t* p2, uint8_t* w4, uint8_t* w2) {
  const int64_t tiles = (k + kTile - 1) / kTile, ld = tiles * kTile, fours = (k + 3) / 4;
  at::parallel_for(0, (n + kRows - 1) / kRows, 1 + kWorthAThread / (kRows * k), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint8_t[]> codes(new uint8_t[kRows * ld]());
    for (int64_t strip = begin; strip < end; strip++) {
      const int64_t row = strip * kRows, rows = row + kRows < n ? kRows : n - row;
      if (!back) {
        if (rows < kRows) std::memset(codes.get(), 0, kRows * ld);
        for (int64_t r = 0; r < rows; r++)
          codes_of_planes(p4 + (row + r) * 2 * fours, p2 + (row + r) * fours, fours, codes.get() + r * ld);
      }
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t at = strip * tiles + tile;
        uint8_t *ab = w4 + at * 2 * kTile, *c = w2 + at * kTile, *of_tile = codes.get() + tile * kTile;
        back ? codes_of(ab, c, of_tile, ld) : tile_of(of_tile, ld, ab, c);
      }
      for (int64_t r = 0; back && r < rows; r++)
        planes_of_codes(codes.get() + r * ld, fours, p4 + (row + r) * 2 * fours, p2 + (row + r) * fours);
    }
  });
}
