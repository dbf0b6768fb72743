// The driver: prepares activations, splits rows over torch's threads, scales, rounds. C linkage, for ctypes.
#include "fp6.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef FP6_SERIAL  // the sanitizers' build, without torch
namespace at {
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  f(begin, end);
}
}  // namespace at
#else
#include <ATen/Parallel.h>
#endif

#define FP6_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
using namespace fp6;

constexpr int64_t kWorthAThread = 1 << 15;  // weights, or activations to prepare

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> aligned(int64_t count) {
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest, ties to even; NaN stays NaN.
uint16_t bf16_of(float f) {
  const uint32_t bits = bits_of(f);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A float is the exact sum of three BF16, of a FP16's value two: each takes the upper eight significant bits of what is left.
// What is left of an infinity is nothing.
void split(float f, int parts, uint16_t* out, int64_t stride) {
  const bool finite = (bits_of(f) & 0x7F800000) != 0x7F800000;
  for (int p = 0; p < parts; p++) {
    const uint32_t upper = f != f ? 0x7FC00000u : bits_of(f) & 0xFFFF0000u;
    out[p * stride] = static_cast<uint16_t>(upper >> 16);
    f = finite ? f - float_of(upper) : 0.f;
  }
}

struct Activations {
  const void* x;  // [m, k], contiguous
  bool bf16;
  int64_t m, k;
  int parts;  // BF16 that make up one activation, where products are BF16

  float at(int64_t i) const {
    return bf16 ? float_of(uint32_t{static_cast<const uint16_t*>(x)[i]} << 16) : static_cast<const float*>(x)[i];
  }
};

// Row m of x as floats, every 32 inputs as 16 even ones and 16 odd ones.
void prepare_floats(const Activations& a, int64_t m, int64_t padded, float* out) {
  for (int64_t k = 0; k < padded; k++) {
    const int64_t to = k / 32 * 32 + k % 32 / 2 + k % 2 * 16;
    out[m * padded + to] = k < a.k ? a.at(m * a.k + k) : 0.f;
  }
}

// Row m of x as `parts` rows of BF16.
void prepare_bf16(const Activations& a, int64_t m, int64_t padded, uint16_t* out) {
  uint16_t* row = out + m * a.parts * padded;
  std::memset(row, 0, a.parts * padded * sizeof(uint16_t));
  if (a.bf16) {
    std::memcpy(row, static_cast<const uint16_t*>(a.x) + m * a.k, a.k * sizeof(uint16_t));
  } else {
    const float* x = static_cast<const float*>(a.x) + m * a.k;
    for (int64_t k = 0; k < a.k; k++) split(x[k], a.parts, row + k, padded);
  }
}

// 16 rows of BF16 as AMX operands [k / 32][16 pairs][16 m][2]; rows past the last are zeros.
void prepare_tiles(const uint16_t* rows, int64_t m, int64_t block, int64_t padded, uint16_t* out) {
  auto* to = reinterpret_cast<uint32_t*>(out + block * 16 * padded);
  const int64_t pairs = padded / 2;
  for (int64_t i = 0; i < 16; i++) {
    const auto* from = reinterpret_cast<const uint32_t*>(rows + (block * 16 + i) * padded);
    for (int64_t p = 0; p < pairs; p++) to[p * 16 + i] = block * 16 + i < m ? from[p] : 0;
  }
}

// Rows of x as `path` reads them; `rows` becomes their number: a row of parts counts as that many.
Buffer<char> prepare(const Activations& a, int64_t tiles, Order order, int64_t* rows) {
  const int64_t padded = tiles * kTile, grain = 1 + kWorthAThread / padded;
  *rows = order == Order::kFloat ? a.m : a.m * a.parts;
  Buffer<char> out = aligned<char>(*rows * padded * (order == Order::kFloat ? 4 : 2));
  at::parallel_for(0, a.m, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      if (order == Order::kFloat)
        prepare_floats(a, m, padded, reinterpret_cast<float*>(out.get()));
      else
        prepare_bf16(a, m, padded, reinterpret_cast<uint16_t*>(out.get()));
    }
  });
  if (order != Order::kTiles) return out;
  const int64_t blocks = ceil_div(*rows, 16);
  Buffer<char> operands = aligned<char>(blocks * 16 * padded * 2);
  at::parallel_for(0, blocks, 1 + grain / 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      prepare_tiles(reinterpret_cast<uint16_t*>(out.get()), *rows, block, padded, reinterpret_cast<uint16_t*>(operands.get()));
  });
  return operands;
}

struct Out {
  void* out;  // [m, n], contiguous
  bool bf16;

  void put(int64_t i, float value) const {
    if (bf16)
      static_cast<uint16_t*>(out)[i] = bf16_of(value);
    else
      static_cast<float*>(out)[i] = value;
  }
};

// Sums [rows, ld] of weights' rows from row0 on, rounded into out; the smallest of an activation's parts is added first.
void write(const float* sums, int64_t ld, const Activations& a, int parts, const Weight& w, int64_t row0, int64_t rows,
           const Out& out) {
  for (int64_t m = 0; m < a.m; m++)
    for (int64_t r = 0; r < rows; r++) {
      float sum = sums[r * ld + m * parts + parts - 1];
      for (int p = parts - 2; p >= 0; p--) sum += sums[r * ld + m * parts + p];
      out.put(m * w.n + row0 + r, sum);
    }
}

#ifdef FP6_X86
// CPUID 7.0, EDX: 22 is AMX-BF16, 24 AMX-TILE. (GCC knows their names in __builtin_cpu_supports from version 14.)
bool has_amx() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1);
}
#endif

const Path* const kPaths[] = {
    &portable,
#ifdef FP6_X86
    &avx2,
    &avx512,
    &avx512_bf16,
    &amx,
#endif
};

}  // namespace

// The paths that this machine runs, as bits of their numbers: 0 portable, 1 AVX2, 2 AVX-512, 3 with BF16 and VBMI, 4 AMX.
FP6_EXPORT int fp6_paths() {
  int paths = 1;
#ifdef FP6_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) paths |= 2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) paths |= 4;
  if (paths & 4 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) paths |= 8;
  if (paths & 8 && has_amx() && amx_permitted()) paths |= 16;
#endif
  return paths;
}

// out [m, n] = x [m, k] times a packed weight, transposed. Contiguous; x and out are float, or BF16 if x_bf16.
FP6_EXPORT void fp6_mm(int path, const void* x, int bf16, int parts, int64_t m, int64_t k, const uint8_t* w4,
                       const uint8_t* w2, const float* scale, const float* values, int64_t n, int64_t group, void* out) {
  const Path& p = *kPaths[path];
  const int64_t tiles = ceil_div(k, kTile);
  const Weight w{w4, w2, scale, values, n, tiles, k, group > 0 && group < k ? group : tiles * kTile};
  const Activations a{x, bf16 != 0, m, k, parts};
  const Out to{out, bf16 != 0};
  int64_t rows = 0;
  const Buffer<char> prepared = prepare(a, tiles, p.order, &rows);
  const int per_activation = static_cast<int>(rows / m);
  const int64_t ld = ceil_div(rows, 16) * 16;
  at::parallel_for(0, ceil_div(n, kRows), 1 + kWorthAThread / (kRows * k), [&](int64_t begin, int64_t end) {
    const Buffer<float> sums = aligned<float>(kChunk * ld);
    for (int64_t strip = begin; strip < end; strip += kChunk / kRows) {
      const int64_t last = strip + kChunk / kRows < end ? strip + kChunk / kRows : end;
      p.mm(w, prepared.get(), rows, strip, last, sums.get(), ld);
      const int64_t row0 = strip * kRows, rows_here = (last * kRows < n ? last * kRows : n) - row0;
      write(sums.get(), ld, a, per_activation, w, row0, rows_here, to);
    }
  });
}

// Rows of the weight, in float or BF16: values times scale, rounded once. The strips given are those of w4 and w2.
FP6_EXPORT void fp6_dequantize(int path, const uint8_t* w4, const uint8_t* w2, const float* scale, int64_t scale_ld,
                               const float* values, int64_t n, int64_t k, int64_t group, void* out, int bf16) {
  const Path& p = *kPaths[path];
  const Weight w{w4, w2, scale, values, n, ceil_div(k, kTile), k, 0};
  const Out to{out, bf16 != 0};
  const int64_t size = group > 0 ? group : k;
  at::parallel_for(0, ceil_div(n, kRows), 1 + kWorthAThread / (kRows * k), [&](int64_t begin, int64_t end) {
    float values_of_tile[kRows][kTile];
    for (int64_t strip = begin; strip < end; strip++)
      for (int64_t tile = 0; tile < w.tiles; tile++) {
        p.decode(w, strip, tile, values_of_tile[0]);
        const int64_t k0 = tile * kTile, count = k - k0 < kTile ? k - k0 : kTile;
        for (int64_t row = strip * kRows; row < n && row < (strip + 1) * kRows; row++)
          for (int64_t i = 0; i < count; i++) {
            const float s = scale[(k0 + i) / size * scale_ld + row];
            to.put(row * k + k0 + i, values_of_tile[row % kRows][i] * s);
          }
      }
  });
}
