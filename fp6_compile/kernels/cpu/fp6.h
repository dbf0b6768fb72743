// What the vector paths and the driver share: a packed weight, prepared activations, and the table of paths.
//
// Layout "cpu.v1" (packing.py): strips of 4 rows; a tile is 64 inputs of a strip, 3 x 64 bytes.
//
//     A = w4[strip][tile][0]   low six bits: row 0        the top two bits of A, B and C,
//     B = w4[strip][tile][1]   low six bits: row 1        in this order from the low end,
//     C = w2[strip][tile]      low six bits: row 2        are the six bits of row 3
//
// so that rows 0 to 2 need no unpacking at all where a look-up ignores an index's top bits (vpermb, vpermi2w). Byte
// 16 l + i holds input 8 l + i, byte 16 l + 8 + i holds input 32 + 8 l + i (i < 8): interleaving looked-up bytes with
// vpunpck leaves 32 and 32 inputs in their order.
#pragma once
#include <cstdint>

namespace fp6 {

constexpr int kRows = 4;    // of a strip
constexpr int kTile = 64;   // inputs of a tile
constexpr int kHalf = 32;   // inputs of what one look-up yields; groups are multiples of it
constexpr int kAhead = 16;  // tiles: 2 and 1 KiB
constexpr int kChunk = 32;  // rows whose sums are kept before they are written: 8 strips

struct Weight {
  const uint8_t* w4;    // [strips, tiles, 2, 64]
  const uint8_t* w2;    // [strips, tiles, 64]
  const float* scale;   // [groups, n]
  const float* values;  // [64], by code
  int64_t n;
  int64_t tiles;
  int64_t inputs;  // before padding
  int64_t group;   // inputs that share a scale: a multiple of 32, or 64 * tiles for one group

  const uint8_t* w4_at(int64_t strip, int64_t tile) const { return w4 + (strip * tiles + tile) * 2 * kTile; }
  const uint8_t* w2_at(int64_t strip, int64_t tile) const { return w2 + (strip * tiles + tile) * kTile; }
  // Asks for a tile that comes later in its strip: the machine's own prefetching starts too late (a quarter of the time
  // at M = 1). Past the end of the planes it does nothing.
  void prefetch(int64_t strip, int64_t tile) const {
    __builtin_prefetch(w4_at(strip, tile));
    __builtin_prefetch(w4_at(strip, tile) + kTile);
    __builtin_prefetch(w2_at(strip, tile));
  }
  // Rows past n are padding of the last strip: any scale does, if it is one that exists.
  float scale_at(int64_t half, int64_t row) const {
    return scale[half * kHalf / group * n + (row < n ? row : n - 1)];
  }
};

// How activations are prepared, padded to whole tiles with zeros.
enum class Order : int {
  kFloat,   // float [m][k]; every 32 inputs as 16 even ones, then 16 odd ones
  kBf16,    // bfloat16 [m][k]
  kTiles,   // bfloat16 operands of AMX [16 pairs of inputs][16 m][2], where operand_at says
};

constexpr int64_t kBlock = 4;             // tiles of inputs that AMX decodes at a time, where many activations read them
constexpr int64_t kOperand = 16 * kHalf;  // values of an operand: 1 KiB

// Where the operand of 32 inputs and 16 of m activations is, in values: what is read one after the other is contiguous,
// [k / 256][m / 32][8 halves][2 blocks of 16 activations].
inline int64_t operand_at(int64_t m, int64_t tiles, int64_t half, int64_t block) {
  const int64_t per_block = 2 * kBlock, begin = half / per_block * per_block, left = 2 * tiles - begin;
  const int64_t halves = left < per_block ? left : per_block, pairs = (m + 31) / 32;
  return ((begin * pairs + block / 2 * halves + half - begin) * 2 + block % 2) * kOperand;
}

// Sums of prepared rows x, scaled: sums[row - 4 * first][ld], m of them, for the rows of at most 8 strips.
using Mm = void (*)(const Weight&, const void* x, int64_t m, int64_t first, int64_t last, float* sums, int64_t ld);
// The unscaled values of one tile, [4][64] floats.
using Decode = void (*)(const Weight&, int64_t strip, int64_t tile, float* out);

struct Path {
  const char* name;
  Order order;
  Mm mm;
  Decode decode;
};

extern const Path portable;
#ifdef FP6_X86
extern const Path avx2, avx512, avx512_bf16, amx;
bool amx_permitted();
#endif

}  // namespace fp6
