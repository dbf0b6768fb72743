// The loops over a strip of four rows, for any vector class V. Included by each vector path, in its own flags and its own
// unnamed namespace, so that no function compiled for one instruction set can be linked into another's place.
//
//     V::kMost                        activations at a time, 8 at most
//     V::Tables(values)               the look-up tables, in registers
//     V::Codes(a, b, c)               a tile's bytes; [row] is what V::decode takes
//     V::decode(tables, codes, half)  half[0], half[1]: 32 weights each
//     V::dot(acc, half, x)            acc plus products with 32 prepared activations; V::X is their type
//     V::scaled(total, acc, s)        total + acc * s
//     V::sum(total)                   over the lanes
#include "fp6.h"

namespace {
using namespace fp6;

// R rows from row r0 on, M activations: each weight is decoded once. Registers hold R x M sums (twice with groups).
template <class V, int R, int M>
inline void rows_by_m(const Weight& w, const typename V::X* x, int64_t strip, int r0, float* sums, int64_t ld) {
  const typename V::Tables tables(w.values);
  const int64_t ldx = w.tiles * kTile;
  const bool halves = w.group % kTile != 0;  // a group may end in the middle of a tile
  typename V::Acc total[R][M] = {};
  auto flush = [&](typename V::Acc(&acc)[R][M], int64_t half) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const float s = w.scale_at(half, strip * kRows + r0 + r);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[r][m] = V::scaled(total[r][m], acc[r][m], s);
    }
  };
  if (halves) {
    for (int64_t tile = 0; tile < w.tiles; tile++) {
      const typename V::Codes codes(w.w4_at(strip, tile), w.w4_at(strip, tile) + kTile, w.w2_at(strip, tile));
      w.prefetch(strip, tile + kAhead);
      typename V::Acc acc[2][R][M] = {};
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        typename V::Half half[2];
        V::decode(tables, codes[r0 + r], half);
        for (int h = 0; h < 2; h++)
          for (int m = 0; m < M; m++) acc[h][r][m] = V::dot(acc[h][r][m], half[h], x + m * ldx + tile * kTile + h * kHalf);
      }
      // A half that lies beyond the last group is padding: its sums are zero, and its scale does not exist.
      flush(acc[0], 2 * tile);
      if ((2 * tile + 1) * kHalf < w.inputs) flush(acc[1], 2 * tile + 1);
    }
  } else {
    for (int64_t begin = 0; begin < w.tiles; begin += w.group / kTile) {
      const int64_t left = w.tiles - begin, end = begin + (left < w.group / kTile ? left : w.group / kTile);
      typename V::Acc acc[R][M] = {};
      for (int64_t tile = begin; tile < end; tile++) {
        const typename V::Codes codes(w.w4_at(strip, tile), w.w4_at(strip, tile) + kTile, w.w2_at(strip, tile));
        w.prefetch(strip, tile + kAhead);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          typename V::Half half[2];
          V::decode(tables, codes[r0 + r], half);
#pragma GCC unroll 2
          for (int h = 0; h < 2; h++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) acc[r][m] = V::dot(acc[r][m], half[h], x + m * ldx + tile * kTile + h * kHalf);
        }
      }
      flush(acc, 2 * begin);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) sums[(r0 + r) * ld + m] = V::sum(total[r][m]);
}

// Up to four activations leave registers for four rows of sums, up to eight for two.
template <class V, int M>
void strip_by_m(const Weight& w, const typename V::X* x, int64_t strip, float* sums, int64_t ld) {
  constexpr int R = M <= 4 ? kRows : kRows / 2;
  for (int r0 = 0; r0 < kRows; r0 += R) rows_by_m<V, R, M>(w, x, strip, r0, sums, ld);
}

// strip_by_m with m, at most M, as its constant.
template <class V, int M>
void dispatch(int64_t m, const Weight& w, const typename V::X* x, int64_t strip, float* sums, int64_t ld) {
  if constexpr (M > 1)
    if (m < M) return dispatch<V, M - 1>(m, w, x, strip, sums, ld);
  strip_by_m<V, M>(w, x, strip, sums, ld);
}

template <class V>
void mm(const Weight& w, const void* prepared, int64_t m, int64_t first, int64_t last, float* sums, int64_t ld) {
  for (int64_t m0 = 0; m0 < m; m0 += V::kMost) {
    const auto* x = static_cast<const typename V::X*>(prepared) + m0 * w.tiles * kTile;
    for (int64_t strip = first; strip < last; strip++)
      dispatch<V, V::kMost>(m - m0, w, x, strip, sums + (strip - first) * kRows * ld + m0, ld);
  }
}

}  // namespace
