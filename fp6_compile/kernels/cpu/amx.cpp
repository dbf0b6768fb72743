// AMX with BF16: 32 rows of weights are decoded into a buffer that stays in cache, as rows of a tile; prepared activations
// (Order::kTiles) are the other operand. A sum is a tile [16 weights' rows][16 activations] of floats.
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512_bf16.h"

namespace {

constexpr int64_t kBlock = 8;              // tiles of inputs that are decoded at a time, where many activations read them
constexpr int kOperand = 16 * 32;          // BF16 of an AMX operand: 1 KiB
constexpr int kWeights = kChunk * kHalf;   // BF16 of a half: two operands

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

// Tiles [begin, end) of the inputs of 8 strips, to out[half][32 rows][32 inputs]. Strips past the last repeat it.
inline void decode_rows(const Weight& w, const Bf16::Tables& tables, int64_t first, int64_t last, int64_t begin,
                        int64_t end, uint16_t* out) {
  for (int64_t s = 0; s < kChunk / kRows; s++) {
    const int64_t strip = first + s < last ? first + s : last - 1;
    for (int64_t tile = begin; tile < end; tile++) {
      const Bf16::Codes codes(w.w4_at(strip, tile), w.w4_at(strip, tile) + kTile, w.w2_at(strip, tile));
      uint16_t* to = out + (tile - begin) * 2 * kWeights + s * kRows * kHalf;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        __m512i half[2];
        Bf16::decode(tables, codes[r], half);
        _mm512_store_si512(to + r * kHalf, half[0]);
        _mm512_store_si512(to + kWeights + r * kHalf, half[1]);
      }
    }
  }
}

// C0 to C3 += products over halves: 32 rows by 16 (one) or 32 activations; `next` is between two blocks of 16 activations.
template <bool one>
inline void multiply(const uint16_t* weights, const uint16_t* x, int64_t next, int64_t halves) {
  for (int64_t h = 0; h < halves; h++, weights += kWeights, x += kOperand) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + kOperand, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (!one) {
      _tile_loadd(7, x + next, 64);
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

struct Operands {
  const Weight& w;
  const uint16_t* x;
  int64_t m, first, last;
  float* sums;
  int64_t ld;

  void scales(int64_t half, float* out) const {
    for (int r = 0; r < kChunk; r++) out[r] = w.scale_at(half, first * kRows + r);
  }
};

// All of K with the sums in registers: one block of activations, one group. Decoding runs one tile ahead of multiplying.
template <bool one>
void one_block(const Operands& o, uint16_t* buffer) {
  const Bf16::Tables tables(o.w.values);
  const int64_t tiles = o.w.tiles, next = tiles * 2 * kOperand;
  float scale[kChunk];
  zero();
  decode_rows(o.w, tables, o.first, o.last, 0, 1, buffer);
  for (int64_t tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles)
      decode_rows(o.w, tables, o.first, o.last, tile + 1, tile + 2, buffer + (tile + 1) % 2 * 2 * kWeights);
    multiply<one>(buffer + tile % 2 * 2 * kWeights, o.x + tile * 2 * kOperand, next, 2);
  }
  o.scales(0, scale);
  flush<one>(scale, o.sums, o.ld);
}

// Blocks of K that stay in the first-level cache, for all activations; sums are added up in memory, group by group.
void blocks(const Operands& o, uint16_t* buffer) {
  const Bf16::Tables tables(o.w.values);
  const int64_t tiles = o.w.tiles, next = tiles * 2 * kOperand, per_group = o.w.group / kHalf;
  const int64_t used = (o.w.inputs + kHalf - 1) / kHalf;
  float scale[kChunk];
  for (int64_t begin = 0; begin < tiles; begin += kBlock) {
    const int64_t end = begin + kBlock < tiles ? begin + kBlock : tiles;
    decode_rows(o.w, tables, o.first, o.last, begin, end, buffer);
    const int64_t stop = 2 * end < used ? 2 * end : used;
    for (int64_t h = 2 * begin, to; h < stop; h = to) {
      to = (h / per_group + 1) * per_group < stop ? (h / per_group + 1) * per_group : stop;
      o.scales(h, scale);
      const uint16_t* weights = buffer + (h - 2 * begin) * kWeights;
      for (int64_t m0 = 0; m0 < o.m; m0 += 32) {
        const uint16_t* x = o.x + m0 / 16 * next + h * kOperand;
        zero();
        if (o.m - m0 > 16) {
          multiply<false>(weights, x, next, to - h);
          flush<false>(scale, o.sums + m0, o.ld);
        } else {
          multiply<true>(weights, x, next, to - h);
          flush<true>(scale, o.sums + m0, o.ld);
        }
      }
    }
  }
}

void mm_amx(const Weight& w, const void* x, int64_t m, int64_t first, int64_t last, float* sums, int64_t ld) {
  alignas(64) static thread_local uint16_t buffer[kBlock * 2 * kWeights];
  const Tiles tiles;
  const Operands o{w, static_cast<const uint16_t*>(x), m, first, last, sums, ld};
  for (int r = 0; r < kChunk; r++)
    for (int64_t i = 0; i < ld; i++) sums[r * ld + i] = 0;
  if (w.group < w.inputs || m > 32)
    blocks(o, buffer);
  else if (m > 16)
    one_block<false>(o, buffer);
  else
    one_block<true>(o, buffer);
}

}  // namespace

const fp6::Path fp6::amx = {"amx", fp6::Order::kTiles, mm_amx, decode_tile};

// Linux hands out the tile registers on request (XFEATURE_XTILEDATA, 18; ARCH_REQ_XCOMP_PERM, 0x1023).
bool fp6::amx_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
