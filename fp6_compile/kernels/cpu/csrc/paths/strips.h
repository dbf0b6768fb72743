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
//     V::floats(half, out)            the 64 weights in their order
#include "paths/rows.h"

namespace {

// R rows from row r0 on, M activations: each weight is decoded once. Registers hold R x M sums (twice with groups).
template <class V, int R, int M>
inline void rows_by_m(const Weight& w, const typename V::X* x, int64_t strip, int r0, float* sums, int64_t ld) {
  const typename V::Tables tables(w.values);
  const int64_t ldx = w.tiles * kTile;
  const bool halves = w.group % kTile != 0;  // a group may end in the middle of a tile
  typename V::Acc total[R][M] = {};
  // Rows past n are padding of the last strip: any scale does, if it is one that exists.
  int64_t at[R];
  for (int r = 0; r < R; r++) at[r] = strip * kRows + r0 + r < w.n ? strip * kRows + r0 + r : w.n - 1;
  auto flush = [&](typename V::Acc(&acc)[R][M], const float* scales) {
    w.prefetch_scales(scales + at[0]);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const float s = scales[at[r]];
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
      flush(acc[0], w.scales(2 * tile * kHalf / w.group));
      if ((2 * tile + 1) * kHalf < w.inputs) flush(acc[1], w.scales((2 * tile + 1) * kHalf / w.group));
    }
  } else {
    const int64_t per_group = w.group / kTile;
    const float* scales = w.scale;
    for (int64_t begin = 0; begin < w.tiles; begin += per_group, scales += w.stride) {
      const int64_t end = w.tiles - begin < per_group ? w.tiles : begin + per_group;
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
      flush(acc, scales);
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
void mm_by_strips(const Weight& w, const void* prepared, int64_t m, int64_t first, int64_t last, float* sums, int64_t ld) {
  for (int64_t m0 = 0; m0 < m; m0 += V::kMost) {
    const auto* x = static_cast<const typename V::X*>(prepared) + m0 * w.tiles * kTile;
    for (int64_t strip = first; strip < last; strip++)
      dispatch<V, V::kMost>(m - m0, w, x, strip, sums + (strip - first) * kRows * ld + m0, ld);
  }
}

// Path::dequantize.
template <class V>
void dequantize_strips(const Weight& w, int64_t first, int64_t last, void* out, bool bf16) {
  const typename V::Tables tables(w.values);
  for (int64_t strip = first; strip < last; strip++)
    for (int64_t tile = 0; tile < w.tiles; tile++) {
      const typename V::Codes codes(w.w4_at(strip, tile), w.w4_at(strip, tile) + kTile, w.w2_at(strip, tile));
      const int64_t k0 = tile * kTile, k1 = k0 + kTile < w.inputs ? k0 + kTile : w.inputs;
      for (int64_t row = strip * kRows; row < w.n && row < (strip + 1) * kRows; row++) {
        typename V::Half half[2];
        alignas(64) float values[kTile];
        V::decode(tables, codes[row % kRows], half);
        V::floats(half, values);
        for (int64_t from = k0, to; from < k1; from = to) {
          const int64_t group = from / w.group;
          to = (group + 1) * w.group < k1 ? (group + 1) * w.group : k1;
          const float s = w.scales(group)[row];
          for (int64_t i = from; i < to; i++) values[i - k0] *= s;
        }
        round_to(out, bf16, row * w.inputs + k0, values, k1 - k0);
      }
    }
}

}  // namespace
