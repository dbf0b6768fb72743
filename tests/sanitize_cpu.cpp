// Every path over odd shapes, for the sanitizers: buffers are as large as the arguments say, and not a byte more.
#include <cstdio>
#include <vector>

#include "fp6.h"

int main() {
  const int64_t shapes[][3] = {{1, 1, 0},     {3, 5, 0},      {41, 300, 0},   {37, 513, 64},
                               {37, 993, 32}, {6, 769, 96}, {34, 1030, 128}, {70, 640, 64}};
  float values[64];
  for (int i = 0; i < 64; i++) values[i] = static_cast<float>(i % 32) / 4 * (i < 32 ? 1 : -1);
  int runs = 0;
  for (int number = 0; number < 5; number++) {
    if (!(fp6::paths() >> number & 1)) continue;
    const fp6::Path& path = fp6::path_at(number);
    for (const auto& [n, k, group] : shapes) {
      const int64_t strips = (n + 3) / 4, tiles = (k + 63) / 64, groups = group ? (k + group - 1) / group : 1;
      const std::vector<uint8_t> w4(strips * tiles * 128, 0x9C), w2(strips * tiles * 64, 0x63);
      const std::vector<float> scale(groups * n, 0.5f);
      for (int bf16 = 0; bf16 < 2; bf16++) {
        const bool fold = bf16 && group % 64 == 0 && group;
        const fp6::Weight w{w4.data(), w2.data(), scale.data(), values, n, n, tiles, k, group ? group : tiles * 64, fold};
        std::vector<char> weight(n * k * (bf16 ? 2 : 4));
        fp6::dequantize(path, w, weight.data(), bf16);
        for (int64_t m : {1, 2, 7, 17, 33, 64, 131}) {
          std::vector<char> x(m * k * (bf16 ? 2 : 4), 0x3D), out(m * n * (bf16 ? 2 : 4));
          for (int parts = bf16 ? 1 : 2; parts < (bf16 ? 2 : 4); parts++, runs++)
            fp6::mm(path, {x.data(), bf16 != 0, m, k, parts}, w, {out.data(), bf16 != 0, m, n, parts});
        }
      }
    }
  }
  std::printf("clean: %d products\n", runs);
  return 0;
}
