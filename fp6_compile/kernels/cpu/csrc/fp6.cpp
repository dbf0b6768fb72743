// The driver: memory, threads, and which rows of the weight are multiplied together. The work is in the paths.
#include "fp6.h"
#include "parallel.h"

#include <cstdlib>
#include <iterator>
#include <memory>
#include <string_view>

namespace {
using namespace fp6;

constexpr int64_t kWorthAThread = 1 << 17;  // weights multiplied with a few rows: about ten microseconds
constexpr int64_t kToPrepare = 1 << 15;     // activations
constexpr int64_t kMostRows = 256;
constexpr int64_t kSums = 1 << 17;  // floats: 512 KiB

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer aligned(int64_t bytes) { return Buffer(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// x as the path reads it.
Buffer prepare(const Path& path, const Activations& x, int64_t rows, int64_t tiles) {
  const int64_t padded = tiles * kTile, unit = path.order == Order::kTiles ? kTranspose : 1;
  const int64_t stored = path.order == Order::kTiles ? ceil_div(rows, 32) * 32 : rows;
  Buffer out = aligned(stored * padded * (path.order == Order::kFloat ? 4 : 2));
  at::parallel_for(0, ceil_div(rows, unit), 1 + kToPrepare / (unit * padded), [&](int64_t begin, int64_t end) {
    path.prepare(x, tiles, begin * unit, end * unit < rows ? end * unit : rows, out.get());
  });
  return out;
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

// What the machine runs.
int supported() {
  int paths = 1;
#ifdef FP6_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) paths |= 2;
  if (paths & 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) paths |= 4;
  if (paths & 4 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) paths |= 8;
  if (paths & 8 && has_amx() && amx_permitted()) paths |= 16;
#endif
  return paths;
}

// The path that FP6_MAX_CPU_PATH names and those before it; all, where it is not set. (build.py refuses other names.)
int permitted() {
  const char* most = std::getenv("FP6_MAX_CPU_PATH");
  for (size_t i = 0; most && i < std::size(kPaths); i++)
    if (std::string_view(most) == kPaths[i]->name) return (2 << i) - 1;
  return ~0;
}

}  // namespace

int fp6::paths() {
  static const int paths = supported() & permitted();
  return paths;
}

const Path& fp6::path_at(int number) { return *kPaths[number]; }

void fp6::mm(const Path& path, const Activations& x, const Weight& w, const Result& y) {
  const int64_t rows = x.rows(path.order == Order::kFloat);
  const Result result{y.out, y.bf16, y.m, y.n, static_cast<int>(rows / x.m)};
  const Buffer prepared = prepare(path, x, rows, w.tiles);
  // Not a power of two: a column of sums must not fall into one set of the cache.
  const int64_t ld = ceil_div(rows, 16) * 16 + 16;
  // Weights' rows at a time: as many as keep the sums in the second-level cache, to read x as seldom as possible.
  const int64_t fit = kSums / ld / kChunk * kChunk;
  const int64_t chunk = rows <= 32 || fit < kChunk ? kChunk : fit < kMostRows ? fit : kMostRows, step = chunk / kRows;
  const int64_t grain = 1 + kWorthAThread / (1 + rows / 16) / (kRows * x.k);
  at::parallel_for(0, ceil_div(w.n, kRows), grain, [&](int64_t begin, int64_t end) {
    const Buffer memory = aligned(chunk * ld * sizeof(float));
    auto* sums = reinterpret_cast<float*>(memory.get());
    for (int64_t strip = begin; strip < end; strip += step) {
      const int64_t last = strip + step < end ? strip + step : end;
      path.mm(w, prepared.get(), rows, strip, last, sums, ld);
      const int64_t row0 = strip * kRows, stop = last * kRows < w.n ? last * kRows : w.n;
      path.write(sums, ld, row0, stop - row0, result);
    }
  });
}

void fp6::dequantize(const Path& path, const Weight& w, void* out, bool bf16) {
  at::parallel_for(0, ceil_div(w.n, kRows), 1 + kWorthAThread / (kRows * w.inputs),
                   [&](int64_t begin, int64_t end) { path.dequantize(w, begin, end, out, bf16); });
}
