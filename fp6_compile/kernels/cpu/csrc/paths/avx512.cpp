// AVX-512 without VBMI or BF16: vpermi2w looks up 32 of 64 BF16 words, which become floats by a shift and a mask.
#include <immintrin.h>

#include "paths/strips.h"

namespace {

struct Words {
  static constexpr int kMost = 8;
  using X = float;
  using Half = __m512i;  // 32 BF16 words
  using Acc = __m512;
  struct Tables {
    __m512i first, second;  // the BF16 of codes 0 to 31 and 32 to 63
    explicit Tables(const float* values) {
      alignas(64) uint16_t words[64];
      for (int i = 0; i < 64; i++) {
        uint32_t bits;
        __builtin_memcpy(&bits, values + i, 4);
        words[i] = static_cast<uint16_t>(bits >> 16);
      }
      first = _mm512_load_si512(words);
      second = _mm512_load_si512(words + 32);
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
      const __m512i above = _mm512_ternarylogic_epi64(_mm512_set1_epi8(12), mid, high, 0xCA);
      row[3] = _mm512_ternarylogic_epi64(_mm512_set1_epi8(3), low, above, 0xCA);
    }
    __m512i operator[](int r) const { return row[r]; }
  };
  static void decode(const Tables& t, __m512i codes, Half (&half)[2]) {
    // Doubled bytes make words whose low six bits are the code; vpermi2w ignores the others.
    half[0] = _mm512_permutex2var_epi16(t.first, _mm512_unpacklo_epi8(codes, codes), t.second);
    half[1] = _mm512_permutex2var_epi16(t.first, _mm512_unpackhi_epi8(codes, codes), t.second);
  }
  static __m512 even(Half half) { return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16)); }
  static __m512 odd(Half half) {
    return _mm512_castsi512_ps(_mm512_and_si512(half, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
  static Acc dot(Acc acc, Half half, const float* x) {
    acc = _mm512_fmadd_ps(even(half), _mm512_loadu_ps(x), acc);
    return _mm512_fmadd_ps(odd(half), _mm512_loadu_ps(x + 16), acc);
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

const fp6::Path fp6::avx512 = {"avx512",     fp6::Order::kFloat, prepare_floats, mm_by_strips<Words>,
                               write,        dequantize_strips<Words>};
