// AVX2: vpshufb looks up the two bytes of 32 magnitudes, in two halves of 16; the sign is bit 5 of every code.
#include <immintrin.h>

#include "paths/strips.h"

namespace {

struct Shuffles {
  static constexpr int kMost = 4;
  using X = float;
  struct Half {
    __m256i words[2];  // 32 BF16 words
  };
  using Acc = __m256;
  struct Tables {
    __m256i byte[2][2];  // [byte of the BF16][bit 4 of the code]
    explicit Tables(const float* values) {
      alignas(16) uint8_t bytes[2][2][16];
      for (int i = 0; i < 32; i++) {
        uint32_t bits;
        __builtin_memcpy(&bits, values + i, 4);
        for (int b = 0; b < 2; b++) bytes[b][i / 16][i % 16] = static_cast<uint8_t>(bits >> (16 + 8 * b));
      }
      for (int b = 0; b < 2; b++)
        for (int h = 0; h < 2; h++)
          byte[b][h] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[b][h])));
    }
  };
  struct Row {
    __m256i codes[2];
  };
  struct Codes {
    Row row[4];
    Codes(const uint8_t* a, const uint8_t* b, const uint8_t* c) {
      for (int i = 0; i < 2; i++) {
        const __m256i va = load(a, i), vb = load(b, i), vc = load(c, i);
        row[0].codes[i] = va;
        row[1].codes[i] = vb;
        row[2].codes[i] = vc;
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(va, 6), _mm256_set1_epi8(3));
        const __m256i mid = _mm256_and_si256(_mm256_srli_epi16(vb, 4), _mm256_set1_epi8(12));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(vc, 2), _mm256_set1_epi8(48));
        row[3].codes[i] = _mm256_or_si256(low, _mm256_or_si256(mid, high));
      }
    }
    static __m256i load(const uint8_t* bytes, int i) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes) + i);
    }
    const Row& operator[](int r) const { return row[r]; }
  };
  static void decode(const Tables& t, const Row& row, Half (&half)[2]) {
    for (int i = 0; i < 2; i++) {
      const __m256i codes = row.codes[i], index = _mm256_and_si256(codes, _mm256_set1_epi8(15));
      const __m256i upper = _mm256_slli_epi16(codes, 3);  // bit 4 in the place that vpblendvb reads
      const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(codes, 2), _mm256_set1_epi8(static_cast<char>(0x80)));
      __m256i byte[2];
      for (int b = 0; b < 2; b++)
        byte[b] = _mm256_blendv_epi8(_mm256_shuffle_epi8(t.byte[b][0], index),
                                     _mm256_shuffle_epi8(t.byte[b][1], index), upper);
      byte[1] = _mm256_or_si256(byte[1], sign);
      half[0].words[i] = _mm256_unpacklo_epi8(byte[0], byte[1]);
      half[1].words[i] = _mm256_unpackhi_epi8(byte[0], byte[1]);
    }
  }
  static __m256 even(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
  static __m256 odd(__m256i words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
  static Acc dot(Acc acc, const Half& half, const float* x) {
    for (int i = 0; i < 2; i++) {
      acc = _mm256_fmadd_ps(even(half.words[i]), _mm256_loadu_ps(x + 8 * i), acc);
      acc = _mm256_fmadd_ps(odd(half.words[i]), _mm256_loadu_ps(x + 16 + 8 * i), acc);
    }
    return acc;
  }
  static Acc scaled(Acc total, Acc acc, float s) { return _mm256_fmadd_ps(acc, _mm256_set1_ps(s), total); }
  static float sum(Acc acc) {
    alignas(32) float lane[8];
    _mm256_store_ps(lane, acc);
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
  }
  static void floats(const Half (&half)[2], float* out) {
    for (int h = 0; h < 2; h++)
      for (int q = 0; q < 4; q++) {
        const __m256i words = half[h].words[q / 2];
        const __m128i part = q % 2 ? _mm256_extracti128_si256(words, 1) : _mm256_castsi256_si128(words);
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(part), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + h * kHalf + q * 8), wide);
      }
  }
};

}  // namespace

const fp6::Path fp6::avx2 = {"avx2", fp6::Order::kFloat, prepare_floats,
                             mm_by_strips<Shuffles>, write, dequantize_strips<Shuffles>};
