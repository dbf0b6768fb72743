// AMX with BF16: 32 rows of weights are decoded into a buffer that stays in cache, as rows of a tile; prepared
// activations (Order::kTiles) are the other operand. A sum is a tile [16 weights' rows][16 activations] of floats.
#include <sys/syscall.h>
#include <unistd.h>

#include "paths/amx/amx_decode.h"

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// oneDNN keeps a configuration of its own in the threads that it shares with us: put it back.
struct Tiles {
  TileConfig before;
  Tiles() {
    _tile_storeconfig(&before);
    const TileConfig ours;
    _tile_loadconfig(&ours);
  }
  ~Tiles() {
    if (before.palette)
      _tile_loadconfig(&before);
    else
      _tile_release();
  }
};

// C0 to C3 += products over halves: 32 rows by 16 (one) or 32 activations.
template <bool one>
inline void multiply(const uint16_t* weights, const uint16_t* x, int64_t halves) {
  for (int64_t h = 0; h < halves; h++, weights += kWeights, x += 2 * kOperand) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + kOperand, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (!one) {
      _tile_loadd(7, x + kOperand, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

inline void zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// sums += C * scale, row by row.
template <bool one>
inline void flush(const float* scale, float* sums, int64_t ld) {
  alignas(64) float c[4][16][16];
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  if (!one) {
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
  }
  for (int i = 0; i < (one ? 2 : 4); i++)
    for (int r = 0; r < 16; r++) {
      const int row = i % 2 * 16 + r;
      float* to = sums + row * ld + i / 2 * 16;
      const __m512 s = _mm512_set1_ps(scale[row]);
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_load_ps(c[i][r]), s, _mm512_loadu_ps(to)));
    }
}

// 32 rows of the weight and all of x.
struct Operands {
  const Weight& w;
  const uint16_t* x;
  int64_t m, first, last;
  float* sums;
  int64_t ld;

  const uint16_t* x_at(int64_t half, int64_t m0) const { return x + operand_at(m, w.tiles, half, m0 / 16); }
  // Of a group, by row. Rows past n repeat the last; folded scales are in the weights already.
  void scales(int64_t group, float* out) const {
    for (int64_t r = 0; r < kChunk; r++) {
      const int64_t row = first * kRows + r < w.n ? first * kRows + r : w.n - 1;
      out[r] = w.fold ? 1.f : w.scales(group)[row];
    }
  }
};

// Whether every group's sums are scaled by themselves.
bool by_group(const Weight& w) { return w.group < w.inputs && !w.fold; }

// All of K with the sums in registers, for activations m0 to m0 + 16 (one) or 32. Decoding runs a tile ahead of multiplying,
// and overlaps with it: up to 64 activations, decoding anew for each 32 beats keeping sums in memory.
template <bool one>
void all_inputs(const Operands& o, const Decoder& decode, int64_t m0, uint16_t* buffer) {
  const int64_t tiles = o.w.tiles;
  float scale[kChunk];
  zero();
  decode(o.first, o.last, 0, 1, buffer);
  for (int64_t tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) decode(o.first, o.last, tile + 1, tile + 2, buffer + (tile + 1) % 2 * 2 * kWeights);
    multiply<one>(buffer + tile % 2 * 2 * kWeights, o.x_at(2 * tile, m0), 2);
  }
  o.scales(0, scale);
  flush<one>(scale, o.sums + m0, o.ld);
}

// C0 to C3 from and to sums, unscaled. (Half the time of `flush`, for weights with one scale per row.)
template <bool one>
inline void resume(const float* sums, int64_t ld) {
  _tile_loadd(0, sums, ld * sizeof(float));
  _tile_loadd(1, sums + 16 * ld, ld * sizeof(float));
  if (!one) {
    _tile_loadd(2, sums + 16, ld * sizeof(float));
    _tile_loadd(3, sums + 16 * ld + 16, ld * sizeof(float));
  }
}

template <bool one>
inline void suspend(float* sums, int64_t ld) {
  _tile_stored(0, sums, ld * sizeof(float));
  _tile_stored(1, sums + 16 * ld, ld * sizeof(float));
  if (!one) {
    _tile_stored(2, sums + 16, ld * sizeof(float));
    _tile_stored(3, sums + 16 * ld + 16, ld * sizeof(float));
  }
}

// Activations m0 to m0 + 16 (one) or 32, over halves [h, to).
template <bool one>
void tile_sums(const Operands& o, const uint16_t* weights, int64_t m0, int64_t h, int64_t to, const float* scale) {
  if (scale)
    zero();
  else
    resume<one>(o.sums + m0, o.ld);
  multiply<one>(weights, o.x_at(h, m0), to - h);
  if (scale)
    flush<one>(scale, o.sums + m0, o.ld);
  else
    suspend<one>(o.sums + m0, o.ld);
}

// The same block of the next 32 rows: too short a stretch for the machine's own prefetching.
inline void prefetch(const Operands& o, int64_t begin) {
  const int64_t strips = (o.w.n + kRows - 1) / kRows, bytes = kBlock * kTile;
  for (int64_t s = o.last; s < o.last + kChunk / kRows && s < strips; s++) {
    const auto* w4 = reinterpret_cast<const char*>(o.w.w4_at(s, begin));
    const auto* w2 = reinterpret_cast<const char*>(o.w.w2_at(s, begin));
    for (int64_t i = 0; i < 2 * bytes; i += 64) _mm_prefetch(w4 + i, _MM_HINT_T1);
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(w2 + i, _MM_HINT_T1);
  }
}

// Block `begin` to `end` of K for 32 rows and all activations; sums are added up in memory, group by group.
void block(const Operands& o, const Decoder& decode, int64_t begin, int64_t end, uint16_t* buffer) {
  const bool groups = by_group(o.w);
  const int64_t used = (o.w.inputs + kHalf - 1) / kHalf, stop = 2 * end < used ? 2 * end : used;
  const int64_t per_group = groups ? o.w.group / kHalf : used;
  float scale[kChunk];
  decode(o.first, o.last, begin, end, buffer);
  prefetch(o, begin);
  for (int64_t h = 2 * begin, to; h < stop; h = to) {
    to = (h / per_group + 1) * per_group < stop ? (h / per_group + 1) * per_group : stop;
    if (groups) o.scales(h / per_group, scale);
    const uint16_t* weights = buffer + (h - 2 * begin) * kWeights;
    for (int64_t m0 = 0; m0 < o.m; m0 += 32)
      (o.m - m0 > 16 ? tile_sums<false> : tile_sums<true>)(o, weights, m0, h, to, groups ? scale : nullptr);
  }
}

constexpr int64_t kSmall = 1 << 19;  // activations: 1 MiB, half of a second-level cache, to be read again for every 32 rows

void apply_scales(const Operands& o) {
  float scale[kChunk];
  o.scales(0, scale);
  for (int r = 0; r < kChunk; r++)
    for (int64_t m = 0; m < o.m; m++) o.sums[r * o.ld + m] *= scale[r];
}

void mm_amx(const Weight& w, const void* x, int64_t m, int64_t first, int64_t last, float* sums, int64_t ld) {
  alignas(64) static thread_local uint16_t buffer[kBlock * 2 * kWeights];
  const Tiles tiles;
  const Decoder decode(w);
  const int64_t strips = kChunk / kRows;
  auto operands = [&](int64_t strip) {
    const int64_t to = strip + strips < last ? strip + strips : last;
    return Operands{w, static_cast<const uint16_t*>(x), m, strip, to, sums + (strip - first) * kRows * ld, ld};
  };
  __builtin_memset(sums, 0, (last - first + strips - 1) / strips * kChunk * ld * sizeof(float));
  if (!by_group(w) && (m <= 32 || (m <= 64 && m * w.inputs <= kSmall))) {
    for (int64_t strip = first; strip < last; strip += strips)
      for (int64_t m0 = 0; m0 < m; m0 += 32)
        (m - m0 > 16 ? all_inputs<false> : all_inputs<true>)(operands(strip), decode, m0, buffer);
  } else {  // x's part of a block stays in the second-level cache for all the strips
    for (int64_t begin = 0; begin < w.tiles; begin += kBlock)
      for (int64_t strip = first; strip < last; strip += strips)
        block(operands(strip), decode, begin, begin + kBlock < w.tiles ? begin + kBlock : w.tiles, buffer);
    if (!by_group(w) && !w.fold)
      for (int64_t strip = first; strip < last; strip += strips) apply_scales(operands(strip));
  }
}

// Operands of 16 rows of x, a stretch of inputs at a time; BF16 that need no padding are read where they are.
void prepare_tiles(const Activations& a, int64_t tiles, int64_t begin, int64_t end, void* out) {
  constexpr int64_t kStretch = 8 * kTile;
  uint16_t copy[16 * kStretch];
  for (int64_t row = begin; row < end; row += 16)
    for (int64_t k0 = 0; k0 < tiles * kTile; k0 += kStretch) {
      const int64_t rows = end - row < 16 ? end - row : 16, left = tiles * kTile - k0;
      const int64_t count = left < kStretch ? left : kStretch;
      const bool as_it_is = a.bf16 && a.k % 2 == 0 && k0 + count <= a.k;
      if (!as_it_is)
        for (int64_t i = 0; i < rows; i++) bf16_values(a, row + i, k0, count, copy + i * kStretch);
      const uint16_t* from = as_it_is ? static_cast<const uint16_t*>(a.x) + row * a.k + k0 : copy;
      for (int64_t h = 0; h < count / kHalf; h++)
        transpose(from + h * kHalf, (as_it_is ? a.k : kStretch) / 2, rows,
                  static_cast<uint16_t*>(out) + operand_at(a.rows(false), tiles, k0 / kHalf + h, row / 16), 16);
    }
}

}  // namespace

const fp6::Path fp6::amx = {"amx", fp6::Order::kTiles, prepare_tiles, mm_amx, write, dequantize_strips<Bf16>};

// Linux hands out the tile registers on request (XFEATURE_XTILEDATA, 18; ARCH_REQ_XCOMP_PERM, 0x1023).
bool fp6::amx_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
