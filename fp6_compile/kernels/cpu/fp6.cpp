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
constexpr int64_t kMostRows = 256;
constexpr int64_t kSums = 1 << 17;  // floats: 512 KiB

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
  const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
  return static_cast<uint16_t>((f != f ? bits | 0x400000 : rounded) >> 16);
}

// A float is the exact sum of three BF16, an FP16 of two: each takes the upper eight significant bits of what is left.
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

// 16 rows of BF16, or as many as there are, in Order::kTiles.
void prepare_tiles(const uint16_t* rows, int64_t m, int64_t block, int64_t tiles, uint16_t* out) {
  const int64_t count = m - block * 16 < 16 ? m - block * 16 : 16;
  for (int64_t half = 0; half < 2 * tiles; half++) {
    auto* to = reinterpret_cast<uint32_t*>(out + operand_at(m, tiles, half, block));
    if (count < 16) std::memset(to, 0, 256 * sizeof(uint32_t));
    for (int64_t i = 0; i < count; i++) {
      const auto* from = reinterpret_cast<const uint32_t*>(rows + (block * 16 + i) * tiles * kTile + half * kHalf);
      for (int64_t p = 0; p < 16; p++) to[p * 16 + i] = from[p];
    }
  }
}

// Rows of x as `path` reads them; `rows` becomes their number: a row of parts counts as that many.
Buffer<char> prepare(const Activations& a, int64_t tiles, Order order, int64_t* rows) {
  const int64_t padded = tiles * kTile, grain = 1 + kWorthAThread / padded;
  *rows = order == Order::kFloat ? a.m : a.m * a.parts;
  const bool as_it_is = order == Order::kTiles && a.bf16 && a.k == padded;
  Buffer<char> out = aligned<char>(as_it_is ? 0 : *rows * padded * (order == Order::kFloat ? 4 : 2));
  at::parallel_for(0, as_it_is ? 0 : a.m, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      if (order == Order::kFloat)
        prepare_floats(a, m, padded, reinterpret_cast<float*>(out.get()));
      else
        prepare_bf16(a, m, padded, reinterpret_cast<uint16_t*>(out.get()));
    }
  });
  if (order != Order::kTiles) return out;
  const int64_t blocks = ceil_div(*rows, 16);
  Buffer<char> operands = aligned<char>((blocks + 1) / 2 * 32 * padded * 2);
  at::parallel_for(0, blocks, 1 + grain / 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      prepare_tiles(static_cast<const uint16_t*>(as_it_is ? a.x : out.get()), *rows, block, tiles,
                    reinterpret_cast<uint16_t*>(operands.get()));
  });
  return operands;
}

struct Out {
  void* out;
  bool bf16;

  // Rounds values to out[at], out[at + 1], ...; a loop without branches, for the compiler to vectorize.
  void put(int64_t at, const float* values, int64_t count) const {
    if (bf16) {
      auto* to = static_cast<uint16_t*>(out) + at;
      for (int64_t i = 0; i < count; i++) to[i] = bf16_of(values[i]);
    } else {
      std::memcpy(static_cast<float*>(out) + at, values, count * sizeof(float));
    }
  }
};

// Sums [rows, ld] of weights' rows from row0 on, transposed into out [m, n]; an activation's smallest part is added first.
void write(const float* sums, int64_t ld, int64_t m, int parts, int64_t n, int64_t row0, int64_t rows, const Out& out) {
  float line[kMostRows];
  for (int64_t i = 0; i < m; i++) {
    const float* from = sums + i * parts;
    for (int64_t r = 0; r < rows; r++) line[r] = from[r * ld + parts - 1];
    for (int p = parts - 2; p >= 0; p--)
      for (int64_t r = 0; r < rows; r++) line[r] += from[r * ld + p];
    out.put(i * n + row0, line, rows);
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

// out [m, n] = x [m, k] times a packed weight, transposed. Contiguous; x and out are float, or BF16 if bf16.
FP6_EXPORT void fp6_mm(int path, const void* x, int bf16, int parts, int64_t m, int64_t k, const uint8_t* w4,
                       const uint8_t* w2, const float* scale, const float* values, int64_t n, int64_t group, void* out) {
  const Path& p = *kPaths[path];
  const int64_t tiles = ceil_div(k, kTile);
  const Weight w{w4, w2, scale, values, n, tiles, k, group > 0 && group < k ? group : tiles * kTile};
  const Out to{out, bf16 != 0};
  int64_t rows = 0;
  const Buffer<char> prepared = prepare({x, bf16 != 0, m, k, parts}, tiles, p.order, &rows);
  const int parts_here = static_cast<int>(rows / m);
  // Not a power of two: a column of sums must not fall into one set of the cache.
  const int64_t ld = ceil_div(rows, 16) * 16 + 16;
  // Weights' rows at a time: as many as keep the sums in the second-level cache, to read x as seldom as possible.
  const int64_t fit = kSums / ld / kChunk * kChunk;
  const int64_t chunk = rows <= 32 || fit < kChunk ? kChunk : fit < kMostRows ? fit : kMostRows, step = chunk / kRows;
  at::parallel_for(0, ceil_div(n, kRows), 1 + kWorthAThread / (kRows * k), [&](int64_t begin, int64_t end) {
    const Buffer<float> sums = aligned<float>(chunk * ld);
    for (int64_t strip = begin; strip < end; strip += step) {
      const int64_t last = strip + step < end ? strip + step : end;
      p.mm(w, prepared.get(), rows, strip, last, sums.get(), ld);
      const int64_t row0 = strip * kRows, stop = last * kRows < n ? last * kRows : n;
      write(sums.get(), ld, m, parts_here, n, row0, stop - row0, to);
    }
  });
}

// Rows of a weight, in float or BF16: values times scale, rounded once. scale [groups, scale_ld] begins at the first row.
FP6_EXPORT void fp6_dequantize(int path, const uint8_t* w4, const uint8_t* w2, const float* scale, int64_t scale_ld,
                               const float* values, int64_t n, int64_t k, int64_t group, void* out, int bf16) {
  const Path& p = *kPaths[path];
  const Weight w{w4, w2, scale, values, n, ceil_div(k, kTile), k, 0};
  const Out to{out, bf16 != 0};
  const int64_t size = group > 0 ? group : k;
  at::parallel_for(0, ceil_div(n, kRows), 1 + kWorthAThread / (kRows * k), [&](int64_t begin, int64_t end) {
    float tile_values[kRows][kTile];
    for (int64_t strip = begin; strip < end; strip++)
      for (int64_t tile = 0; tile < w.tiles; tile++) {
        p.decode(w, strip, tile, tile_values[0]);
        const int64_t k0 = tile * kTile, k1 = k0 + kTile < k ? k0 + kTile : k;
        for (int64_t row = strip * kRows; row < n && row < (strip + 1) * kRows; row++) {
          float* of_row = tile_values[row % kRows];
          for (int64_t from = k0, end_of_group; from < k1; from = end_of_group) {
            end_of_group = (from / size + 1) * size < k1 ? (from / size + 1) * size : k1;
            const float s = scale[from / size * scale_ld + row];
            for (int64_t i = from; i < end_of_group; i++) of_row[i - k0] *= s;
          }
          to.put(row * k + k0, of_row, k1 - k0);
        }
      }
  });
}
