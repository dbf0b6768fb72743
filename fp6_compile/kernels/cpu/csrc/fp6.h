// What the vector paths and the driver share: a packed weight, activations and results, and the table of paths.
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
constexpr int kTranspose = 16;  // rows and columns of floats that are transposed at once

struct Weight {
  const uint8_t* w4;    // [strips, tiles, 2, 64]
  const uint8_t* w2;    // [strips, tiles, 64]
  const float* scale;   // [groups, stride]
  const float* values;  // [64], by code
  int64_t n;
  int64_t stride;  // n of the whole weight
  int64_t tiles;
  int64_t inputs;  // before padding
  int64_t group;   // inputs that share a scale, or 64 * tiles for one group; `mm` takes multiples of 32
  bool fold;       // scales multiply weights, rounded to BF16, instead of sums; only AMX, groups of multiples of 64

  const uint8_t* w4_at(int64_t strip, int64_t tile) const { return w4 + (strip * tiles + tile) * 2 * kTile; }
  const uint8_t* w2_at(int64_t strip, int64_t tile) const { return w2 + (strip * tiles + tile) * kTile; }
  // Asks for a tile that comes later in its strip: the machine's own prefetching starts too late (a quarter of the time
  // at M = 1). Past the end of the planes it does nothing.
  void prefetch(int64_t strip, int64_t tile) const {
    __builtin_prefetch(w4_at(strip, tile));
    __builtin_prefetch(w4_at(strip, tile) + kTile);
    __builtin_prefetch(w2_at(strip, tile));
  }
  // Asks for the same group's scales 64 rows on: rows of a group are far from the next group's, each on a page of its own.
  static void prefetch_scales(const float* scales) { __builtin_prefetch(scales + 64); }
  // Rows [row, row + count) alone; row is a multiple of 4. Scales are still `stride` apart.
  Weight from(int64_t row, int64_t count) const {
    Weight part = *this;
    part.w4 = w4_at(row / kRows, 0), part.w2 = w2_at(row / kRows, 0), part.scale = scale + row, part.n = count;
    return part;
  }
  // The scales of a group, by row.
  const float* scales(int64_t group_index) const { return scale + group_index * stride; }
};

// x [m, k], contiguous.
struct Activations {
  const void* x;
  bool bf16;  // or float
  int64_t m, k;
  int parts;  // BF16 that make up one activation, where products are BF16

  int64_t rows(bool as_floats) const { return as_floats ? m : m * parts; }
};

// out [m, n], contiguous. An activation's sums are the sum of `parts` columns.
struct Result {
  void* out;
  bool bf16;  // or float
  int64_t m, n;
  int parts;
};

// How activations are prepared, padded to whole tiles with zeros. A row is one part of one activation; floats have one part.
enum class Order : int {
  kFloat,  // float [rows][k]; every 32 inputs as 16 even ones, then 16 odd ones
  kBf16,   // bfloat16 [rows][k]
  kTiles,  // bfloat16 operands of AMX [16 pairs of inputs][16 rows][2], where operand_at says
};

constexpr int64_t kBlock = 4;             // tiles of inputs that AMX decodes at a time, where many activations read them
constexpr int64_t kOperand = 16 * kHalf;  // values of an operand: 1 KiB

// Where the operand of 32 inputs and 16 of m rows is, in values: what is read one after the other is contiguous,
// [k / 256][m / 32][8 halves][2 blocks of 16 rows].
inline int64_t operand_at(int64_t m, int64_t tiles, int64_t half, int64_t block) {
  const int64_t per_block = 2 * kBlock, begin = half / per_block * per_block, left = 2 * tiles - begin;
  const int64_t halves = left < per_block ? left : per_block, pairs = (m + 31) / 32;
  return ((begin * pairs + block / 2 * halves + half - begin) * 2 + block % 2) * kOperand;
}

struct Path {
  const char* name;
  Order order;
  // Prepares rows [begin, end) of x, padded to `tiles`; in kTiles, begin is a multiple of 16.
  void (*prepare)(const Activations&, int64_t tiles, int64_t begin, int64_t end, void* out);
  // Scaled sums of m prepared rows x: sums[row - 4 * first][ld], for the weight's rows of strips [first, last).
  void (*mm)(const Weight&, const void* x, int64_t m, int64_t first, int64_t last, float* sums, int64_t ld);
  // Adds up, rounds and transposes sums [rows][ld] into columns row0 and on of the result. Whole blocks of kTranspose rows
  // and columns of sums are read.
  void (*write)(const float* sums, int64_t ld, int64_t row0, int64_t rows, const Result&);
  // Rows [0, n) of strips [first, last), values times scale, rounded once, to out [n, inputs]. Groups of any size.
  void (*dequantize)(const Weight&, int64_t first, int64_t last, void* out, bool bf16);
};

extern const Path portable;
#ifdef FP6_X86
extern const Path avx2, avx512, avx512_bf16, amx;
bool amx_permitted();
#endif

// fp6.cpp, called by op.cpp.

// The paths that this machine runs, as bits of their numbers: 0 portable, 1 AVX2, 2 AVX-512, 3 with BF16 and VBMI, 4 AMX.
// A machine with one of them has all before it; none comes after the one that FP6_MAX_CPU_PATH names.
int paths();
const Path& path_at(int number);
// result = x times the weight, transposed.
void mm(const Path&, const Activations&, const Weight&, const Result&);
// The weight as [n, inputs], BF16 or float.
void dequantize(const Path&, const Weight&, void* out, bool bf16);

}  // namespace fp6
