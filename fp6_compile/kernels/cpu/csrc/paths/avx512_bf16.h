// AVX-512 with VBMI and BF16: vpermb looks up the two bytes of 64 BF16 values; the top bits of an index are ignored.
// Per 64 weights: 2 vpermb, 2 vpunpck, 2 vdpbf16ps, and 5 operations per tile for row 3.
#include <immintrin.h>

#include "paths/strips.h"

namespace {

struct Bf16 {
  static constexpr int kMost = 8;
  using X = uint16_t;
  using Half = __m512i;
  using Acc = __m512;
  struct Tables {
    __m512i low, high;  // the bytes of the BF16 of every code
    Tables() = default;
    explicit Tables(const float* values) {
      alignas(64) uint8_t bytes[2][64];
      for (int i = 0; i < 64; i++) {
        uint32_t bits;
        __builtin_memcpy(&bits, values + i, 4);
        bytes[0][i] = static_cast<uint8_t>(bits >> 16);
        bytes[1][i] = static_cast<uint8_t>(bits >> 24);
      }
      low = _mm512_load_si512(bytes[0]);
      high = _mm512_load_si512(bytes[1]);
    }
  };
  struct Codes {
    __m512i row[4];
    Codes(const uint8_t* a, const uint8_t* b, const uint8_t* c) {
      row[0] = _mm512_loadu_si512(a);
      row[1] = _mm512_loadu_si512(b);
      row[2] = _mm512_loadu_si512(c);
      const __m512i low = _mm512_srli_epi16(row[0], 6), mid = _mm512_srli_epi16(row[1], 4);
      const __m512i high = _mm512_srli_epi16(row[2], 2);
      row[3] = select(_mm512_set1_epi8(3), low, select(_mm512_set1_epi8(12), mid, high));
    }
    __m512i operator[](int r) const { return row[r]; }
    static __m512i select(__m512i mask, __m512i yes, __m512i no) {
      return _mm512_ternarylogic_epi64(mask, yes, no, 0xCA);
    }
  };
  static void decode(const Tables& t, __m512i codes, Half (&half)[2]) {
    const __m512i low = _mm512_permutexvar_epi8(codes, t.low), high = _mm512_permutexvar_epi8(codes, t.high);
    half[0] = _mm512_unpacklo_epi8(low, high);
    half[1] = _mm512_unpackhi_epi8(low, high);
  }
  static Acc dot(Acc acc, Half half, const uint16_t* x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)half, (__m512bh)_mm512_loadu_si512(x));
  }
  static Acc scaled(Acc total, Acc acc, float s) { return _mm512_fmadd_ps(acc, _mm512_set1_ps(s), total); }
  static float sum(Acc acc) { return _mm512_reduce_add_ps(acc); }
  static void floats(const Half (&half)[2], float* out) {
    for (int h = 0; h < 2; h++)
      for (int q = 0; q < 2; q++) {
        const __m256i words = q ? _mm512_extracti64x4_epi64(half[h], 1) : _mm512_castsi512_si256(half[h]);
        _mm512_storeu_si512(out + h * kHalf + q * 16, _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
      }
  }
};

}  // namespace
