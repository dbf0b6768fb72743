// Plain C++, in loops that compilers vectorize: every machine without a path of its own, NEON ones among them.
#include "paths/strips.h"

namespace {

struct Plain {
  static constexpr int kMost = 4;
  using X = float;
  struct Half {
    float w[kHalf];
  };
  struct Acc {
    float lane[16] = {};
  };
  struct Tables {
    const float* values;
    explicit Tables(const float* v) : values(v) {}
  };
  struct Row {
    uint8_t code[kTile];
  };
  struct Codes {
    const uint8_t *a, *b, *c;
    Codes(const uint8_t* a, const uint8_t* b, const uint8_t* c) : a(a), b(b), c(c) {}
    Row operator[](int row) const {
      Row out;
      if (row < 3) {
        const uint8_t* from = row == 0 ? a : row == 1 ? b : c;
        for (int i = 0; i < kTile; i++) out.code[i] = from[i] & 63;
      } else {
        for (int i = 0; i < kTile; i++) out.code[i] = a[i] >> 6 | b[i] >> 6 << 2 | c[i] >> 6 << 4;
      }
      return out;
    }
  };
  static void decode(const Tables& tables, const Row& row, Half (&half)[2]) {
    for (int l = 0; l < 4; l++)
      for (int h = 0; h < 2; h++)
        for (int i = 0; i < 8; i++) {
          const int k = 8 * l + i;
          half[h].w[k / 2 + k % 2 * 16] = tables.values[row.code[16 * l + 8 * h + i]];
        }
  }
  static Acc dot(Acc acc, const Half& half, const float* x) {
    for (int i = 0; i < 16; i++) acc.lane[i] += half.w[i] * x[i];
    for (int i = 0; i < 16; i++) acc.lane[i] += half.w[16 + i] * x[16 + i];
    return acc;
  }
  static Acc scaled(Acc total, const Acc& acc, float s) {
    for (int i = 0; i < 16; i++) total.lane[i] += acc.lane[i] * s;
    return total;
  }
  static float sum(const Acc& acc) {
    float s = 0;
    for (float lane : acc.lane) s += lane;
    return s;
  }
  static void floats(const Half (&half)[2], float* out) {
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < kHalf; i++) out[h * kHalf + i] = half[h].w[i / 2 + i % 2 * 16];
  }
};

}  // namespace

const fp6::Path fp6::portable = {"portable", fp6::Order::kFloat, prepare_floats,
                                 mm_by_strips<Plain>, write, dequantize_strips<Plain>};
