// Formats of any width, a row of the weight at a time: bytes of planes to codes, codes to floats, a dot product with each
// row of x. Loops that compilers vectorize, one clone for each instruction set.
#include "bit_planes/planes.h"

#include <memory>

#include "bits.h"
#include "fp6.h"
#include "parallel.h"

#ifdef FP6_X86
#include <immintrin.h>
#endif

#if defined(FP6_X86) && defined(__linux__) && !defined(FP6_WITHOUT_TORCH)  // clones are resolved before sanitizers are up
#define FP6_WIDE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FP6_WIDE_CLONES
#endif

namespace {
using namespace fp6;

constexpr int64_t kWorthAThread = 1 << 16;  // weights
constexpr int64_t kLanes = 64;              // sums that are kept side by side

// The codes of a byte of a plane, a byte each from the low end.
struct Spread {
  uint64_t codes[256];
  explicit Spread(int width) {
    for (int byte = 0; byte < 256; byte++) {
      codes[byte] = 0;
      for (int i = 0; i < 8 / width; i++)
        codes[byte] |= static_cast<uint64_t>(byte >> i * width & ((1 << width) - 1)) << 8 * i;
    }
  }
};

FP6_WIDE_CLONES void codes_of_fours(const uint8_t* plane, int64_t bytes, uint8_t* codes) {
  for (int64_t i = 0; i < bytes; i++) {
    codes[2 * i] = plane[i] & 15;
    codes[2 * i + 1] = plane[i] >> 4;
  }
}

// Adds the codes of a plane of width 2 (T of four bytes) or 1 (of eight), in place.
template <class T, int width>
void add_codes(const uint8_t* plane, int64_t bytes, int shift, bool first, uint8_t* codes) {
  static const Spread spread(width);
  for (int64_t i = 0; i < bytes; i++) {
    T known = 0;
    if (!first) std::memcpy(&known, codes + i * sizeof(T), sizeof(T));
    known |= static_cast<T>(spread.codes[plane[i]]) << shift;
    std::memcpy(codes + i * sizeof(T), &known, sizeof(T));
  }
}

// Value by value: the magnitude's bits as a float, whose exponent is moved by the difference of the biases; a subnormal
// loses the implicit one that this gives it.
FP6_WIDE_CLONES void floats_of_codes(const uint8_t* codes, int64_t count, int exponent_bits, int mantissa_bits,
                                     float* out) {
  const int bits = 1 + exponent_bits + mantissa_bits, up = 23 - mantissa_bits;
  const uint32_t most = (1u << (bits - 1)) - 1, normals = 1u << mantissa_bits;
  const uint32_t bias = static_cast<uint32_t>(128 - (1 << (exponent_bits - 1))) << 23, next = bias + (1u << 23);
  const float implicit = float_of(next);
  for (int64_t i = 0; i < count; i++) {
    const uint32_t code = codes[i], magnitude = (code & most) << up;
    const float subnormal = float_of(magnitude + next) - implicit;
    const uint32_t value = (code & most) < normals ? bits_of(subnormal) : magnitude + bias;
    out[i] = float_of(value | code >> (bits - 1) << 31);
  }
  if (exponent_bits < 5) return;
  for (int64_t i = 0; i < count; i++) {  // the all-ones exponent is IEEE's
    const uint32_t value = bits_of(out[i]);
    out[i] = float_of(out[i] > -65536.f && out[i] < 65536.f ? value : value | 0x7F800000);
  }
}

#ifdef FP6_X86
// The same, to the next multiple of 32: up to five bits are looked up, and more go through FP16, whose
// conversion knows subnormals.
__attribute__((target("avx512f,avx512bw,avx512vl"))) void floats_of_codes_avx512(const uint8_t* codes, int64_t count,
                                                                                 int exponent_bits, int mantissa_bits,
                                                                                 const float* values, float* out) {
  const int bits = 1 + exponent_bits + mantissa_bits;
  if (bits <= 5) {
    const __m512 low = _mm512_loadu_ps(values), high = _mm512_loadu_ps(values + 16);
    for (int64_t i = 0; i < count; i += 16) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(low, code, high));
    }
    return;
  }
  const __m512i sign = _mm512_set1_epi16(1 << (bits - 1)), rest = _mm512_set1_epi16((1 << (bits - 1)) - 1);
  const __m128i up_sign = _mm_cvtsi32_si128(16 - bits), up = _mm_cvtsi32_si128(10 - mantissa_bits);
  const __m512 rescale = _mm512_set1_ps(1 << (16 - (1 << (exponent_bits - 1))));
  for (int64_t i = 0; i < count; i += 32) {
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    const __m512i half = _mm512_or_si512(_mm512_sll_epi16(_mm512_and_si512(code, sign), up_sign),
                                         _mm512_sll_epi16(_mm512_and_si512(code, rest), up));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), rescale));
    _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), rescale));
  }
}

bool has_avx512() {
  static const bool supported = paths() & 4 && __builtin_cpu_supports("avx512vl");
  return supported;
}
#endif

FP6_WIDE_CLONES float dot(const float* x, const float* w, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t j = 0; j < kLanes; j++) sums[j] += x[i + j] * w[i + j];
  for (int64_t step = kLanes / 2; step > 0; step /= 2)
    for (int64_t j = 0; j < step; j++) sums[j] += sums[j + step];
  for (; i < count; i++) sums[0] += x[i] * w[i];
  return sums[0];
}

FP6_WIDE_CLONES void scaled(const float* w, int64_t count, float scale, float* out) {
  for (int64_t i = 0; i < count; i++) out[i] = w[i] * scale;
}

FP6_WIDE_CLONES void scaled(const float* w, int64_t count, float scale, uint16_t* out) {
  for (int64_t i = 0; i < count; i++) {
    out[i] = bf16_of(w[i] * scale);
  }
}

// A row of the weight, decoded. Planes may hold up to seven codes more than k, and codes are decoded 32 at a time.
class Row {
 public:
  explicit Row(const PlanesWeight& w) : w_(w), codes_(new uint8_t[w.k + 32]()), values_(new float[w.k + 32]) {
    uint8_t all[32];
    for (int i = 0; i < 32; i++) all[i] = i;
    floats_of_codes(all, 32, w.exponent_bits, w.mantissa_bits, table_);
  }

  const float* decode(int64_t row) {
    for (int i = 0, shift = 0; i < 3 && w_.widths[i]; shift += w_.widths[i++]) {
      const uint8_t* plane = w_.planes[i] + row * w_.strides[i];
      const int64_t per_byte = 8 / w_.widths[i], bytes = (w_.k + per_byte - 1) / per_byte;
      if (w_.widths[i] == 8) std::memcpy(codes_.get(), plane, w_.k);
      if (w_.widths[i] == 4) codes_of_fours(plane, bytes, codes_.get());
      if (w_.widths[i] == 2) add_codes<uint32_t, 2>(plane, bytes, shift, i == 0, codes_.get());
      if (w_.widths[i] == 1) add_codes<uint64_t, 1>(plane, bytes, shift, i == 0, codes_.get());
    }
#ifdef FP6_X86
    if (has_avx512()) {
      floats_of_codes_avx512(codes_.get(), w_.k, w_.exponent_bits, w_.mantissa_bits, table_, values_.get());
      return values_.get();
    }
#endif
    floats_of_codes(codes_.get(), w_.k, w_.exponent_bits, w_.mantissa_bits, values_.get());
    return values_.get();
  }

 private:
  const PlanesWeight& w_;
  const std::unique_ptr<uint8_t[]> codes_;
  const std::unique_ptr<float[]> values_;
  float table_[32];  // values of the first codes
};

// Calls f(first input, inputs, scale) for every group of a row.
template <class F>
void for_groups(const PlanesWeight& w, int64_t row, F f) {
  for (int64_t from = 0, g = 0; from < w.k; from += w.group, g++)
    f(from, w.group < w.k - from ? w.group : w.k - from, w.scale[g * w.n + row]);
}

template <class T>
void dequantize_rows(const PlanesWeight& w, int64_t first, int64_t count, T* out) {
  at::parallel_for(0, count, 1 + kWorthAThread / w.k, [&](int64_t begin, int64_t end) {
    Row row(w);
    for (int64_t r = begin; r < end; r++) {
      const float* values = row.decode(first + r);
      for_groups(w, first + r, [&](int64_t from, int64_t inputs, float scale) {
        scaled(values + from, inputs, scale, out + r * w.k + from);
      });
    }
  });
}

}  // namespace

void fp6::mm(const PlanesWeight& w, const float* x, int64_t m, float* out) {
  at::parallel_for(0, w.n, 1 + kWorthAThread / w.k, [&](int64_t begin, int64_t end) {
    Row row(w);
    for (int64_t n = begin; n < end; n++) {
      const float* values = row.decode(n);
      for (int64_t i = 0; i < m; i++) {
        float sum = 0;
        for_groups(w, n, [&](int64_t from, int64_t inputs, float scale) {
          sum += dot(x + i * w.k + from, values + from, inputs) * scale;
        });
        out[i * w.n + n] = sum;
      }
    }
  });
}

void fp6::dequantize(const PlanesWeight& w, int64_t first, int64_t count, void* out, bool bf16) {
  if (bf16)
    dequantize_rows(w, first, count, static_cast<uint16_t*>(out));
  else
    dequantize_rows(w, first, count, static_cast<float*>(out));
}
