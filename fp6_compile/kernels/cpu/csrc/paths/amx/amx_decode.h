// Weights on their way into AMX tiles: 32 rows at a time, decoded into a buffer [tile][half][32 rows][32 inputs].
#include "paths/avx512_bf16.h"

namespace {

constexpr int kWeights = kChunk * kHalf;  // values of a half of 32 rows: two operands

// Look-up tables of the codes' values times a scale, rounded to BF16: six instructions, beside ten that decode 128 weights.
struct Folded {
  __m512 magnitudes[2];
  __m512i low, high, sign;  // indices of the bytes of 32 BF16 words, twice over; the sign of the second half

  explicit Folded(const float* values) : magnitudes{_mm512_loadu_ps(values), _mm512_loadu_ps(values + 16)} {
    alignas(64) uint8_t index[64];
    for (int i = 0; i < 64; i++) index[i] = static_cast<uint8_t>(i % 32 * 2);
    low = _mm512_load_si512(index);
    high = _mm512_or_si512(low, _mm512_set1_epi8(1));
    sign = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(static_cast<char>(0x80)), 1);
  }
  Bf16::Tables tables(float scale) const {
    const __m512 s = _mm512_set1_ps(scale);
    const auto words = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(magnitudes[1], s), _mm512_mul_ps(magnitudes[0], s));
    Bf16::Tables out;
    out.low = _mm512_permutexvar_epi8(low, words);
    out.high = _mm512_xor_si512(_mm512_permutexvar_epi8(high, words), sign);
    return out;
  }
};

// Decodes tiles [begin, end) of strips [first, first + 8), those past `last` repeating it.
struct Decoder {
  const Weight& w;
  const Bf16::Tables plain;
  const Folded folded;

  explicit Decoder(const Weight& w) : w(w), plain(w.values), folded(w.values) {}

  void operator()(int64_t first, int64_t last, int64_t begin, int64_t end, uint16_t* out) const {
    for (int64_t s = 0; s < kChunk / kRows; s++) {
      const int64_t strip = first + s < last ? first + s : last - 1;
      uint16_t* to = out + s * kRows * kHalf;
      w.fold ? decode<true>(strip, begin, end, to) : decode<false>(strip, begin, end, to);
    }
  }

 private:
  template <bool fold>
  void decode(int64_t strip, int64_t begin, int64_t end, uint16_t* out) const {
    int64_t rows[kRows];  // of scales: past n, the last
    for (int r = 0; r < kRows; r++) rows[r] = strip * kRows + r < w.n ? strip * kRows + r : w.n - 1;
    for (int64_t tile = begin; tile < end; tile++, out += 2 * kWeights) {
      const Bf16::Codes codes(w.w4_at(strip, tile), w.w4_at(strip, tile) + kTile, w.w2_at(strip, tile));
      const float* scales = w.scales(fold ? tile * kTile / w.group : 0);
      w.prefetch(strip, tile + kAhead / 2);
      if (fold) w.prefetch_scales(scales + rows[0]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        __m512i half[2];
        Bf16::decode(fold ? folded.tables(scales[rows[r]]) : plain, codes[r], half);
        _mm512_store_si512(out + r * kHalf, half[0]);
        _mm512_store_si512(out + kWeights + r * kHalf, half[1]);
      }
    }
  }
};

}  // namespace
