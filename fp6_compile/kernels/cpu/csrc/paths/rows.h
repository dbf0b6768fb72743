// Activations on their way in, results on their way out: rounding, splitting, transposing. Included by each vector path, in
// its own flags and its own unnamed namespace; what is not written with intrinsics is loops for the compiler to vectorize.
#include "bits.h"
#include "fp6.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {
using namespace fp6;

// A float is the exact sum of three BF16, an FP16 of two: each takes the upper eight significant bits of what is left.
// What is left of an infinity is nothing.
template <int P>
inline uint16_t part_of(float f) {
  const bool finite = (bits_of(f) & 0x7F800000) != 0x7F800000;
  for (int p = 0; p < P; p++) f = finite ? f - float_of(bits_of(f) & 0xFFFF0000u) : 0.f;
  return f != f ? 0x7FC0 : static_cast<uint16_t>(bits_of(f) >> 16);
}

template <int P>
inline void parts_of(const float* x, int64_t k, uint16_t* out) {
  for (int64_t i = 0; i < k; i++) out[i] = part_of<P>(x[i]);
}

// Inputs [k0, k0 + count) of a row of Order::kBf16, zeros beyond the last.
inline void bf16_values(const Activations& a, int64_t row, int64_t k0, int64_t count, uint16_t* out) {
  const int64_t left = a.k - k0, used = left < 0 ? 0 : left < count ? left : count, at = row / a.parts * a.k + k0;
  std::memset(out + used, 0, (count - used) * sizeof(uint16_t));
  if (used == 0) return;
  if (a.bf16) {
    std::memcpy(out, static_cast<const uint16_t*>(a.x) + at, used * sizeof(uint16_t));
    return;
  }
  const int part = static_cast<int>(row % a.parts);
  (part == 0 ? parts_of<0> : part == 1 ? parts_of<1> : parts_of<2>)(static_cast<const float*>(a.x) + at, used, out);
}

inline void prepare_bf16(const Activations& a, int64_t tiles, int64_t begin, int64_t end, void* out) {
  const int64_t padded = tiles * kTile;
  for (int64_t row = begin; row < end; row++)
    bf16_values(a, row, 0, padded, static_cast<uint16_t*>(out) + row * padded);
}

// Values k to k + 32 (or to the end) of a row as floats, even ones first.
template <class T>
inline void evens_and_odds(const T* x, int64_t count, float* out) {
  for (int64_t i = 0; i < 16; i++)
    for (int64_t odd = 0; odd < 2; odd++) {
      float value = 0;
      if (2 * i + odd < count) {
        if constexpr (sizeof(T) == 2)
          value = float_of(uint32_t{x[2 * i + odd]} << 16);
        else
          value = x[2 * i + odd];
      }
      out[odd * 16 + i] = value;
    }
}

template <class T>
inline void float_row(const T* x, int64_t k, int64_t padded, float* out) {
  int64_t at = 0;
  for (; at + 32 <= k; at += 32) evens_and_odds(x + at, 32, out + at);
  for (; at < padded; at += 32) evens_and_odds(x + (at < k ? at : 0), at < k ? k - at : 0, out + at);
}

inline void prepare_floats(const Activations& a, int64_t tiles, int64_t begin, int64_t end, void* out) {
  const int64_t padded = tiles * kTile;
  for (int64_t m = begin; m < end; m++) {
    float* row = static_cast<float*>(out) + m * padded;
    if (a.bf16)
      float_row(static_cast<const uint16_t*>(a.x) + m * a.k, a.k, padded, row);
    else
      float_row(static_cast<const float*>(a.x) + m * a.k, a.k, padded, row);
  }
}

// to[j][i] = from[i][j] of 32-bit words, for i < rows (zeros beyond) and all 16 j.
inline void transpose(const void* from, int64_t ld_from, int64_t rows, void* to, int64_t ld_to) {
#ifdef __AVX512F__
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    a[i] = i < rows ? _mm512_loadu_si512(static_cast<const uint32_t*>(from) + i * ld_from) : _mm512_setzero_si512();
  // Two rows' words, then four rows', by unpacking; then two rounds of 128-bit lanes.
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xDD);
    }
#pragma GCC unroll 16
  for (int j = 0; j < 8; j++) {
    a[j] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88);
    a[j + 8] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0xDD);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) _mm512_storeu_si512(static_cast<uint32_t*>(to) + j * ld_to, a[j]);
#else
  for (int j = 0; j < 16; j++)
    for (int i = 0; i < 16; i++)
      static_cast<uint32_t*>(to)[j * ld_to + i] = i < rows ? static_cast<const uint32_t*>(from)[i * ld_from + j] : 0;
#endif
}

inline void round_to(void* out, bool bf16, int64_t at, const float* values, int64_t count) {
  if (bf16) {
    auto* to = static_cast<uint16_t*>(out) + at;
    for (int64_t i = 0; i < count; i++) to[i] = bf16_of(values[i]);
  } else {
    std::memcpy(static_cast<float*>(out) + at, values, count * sizeof(float));
  }
}

// Path::write; an activation's smallest part is added first.
inline void write(const float* sums, int64_t ld, int64_t row0, int64_t rows, const Result& y) {
  constexpr int kColumns = 3 * kTranspose;  // whole activations of one, two or three parts
  float lines[kColumns][kChunk];
  const int64_t columns = y.m * y.parts;
  for (int64_t r0 = 0; r0 < rows; r0 += kChunk)
    for (int64_t c0 = 0; c0 < columns; c0 += kColumns) {
      const int64_t count = columns - c0 < kColumns ? columns - c0 : kColumns;
      const int64_t left = rows - r0 < kChunk ? rows - r0 : kChunk;
      for (int64_t r = 0; r < left; r += kTranspose)
        for (int64_t c = 0; c < count; c += kTranspose)
          transpose(sums + (r0 + r) * ld + c0 + c, ld, kTranspose, &lines[c][r], kChunk);
      for (int64_t i = 0; i < count; i += y.parts) {
        float* line = lines[i + y.parts - 1];
        for (int p = y.parts - 2; p >= 0; p--)
          for (int64_t r = 0; r < kChunk; r++) line[r] += lines[i + p][r];
        round_to(y.out, y.bf16, (c0 + i) / y.parts * y.n + row0 + r0, line, left);
      }
    }
}

}  // namespace
