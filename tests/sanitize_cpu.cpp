// Every path over odd shapes, for the sanitizers: buffers are as large as the arguments say, and not a byte more.
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" int fp6_paths();
extern "C" void fp6_mm(int, const void*, int, int, int64_t, int64_t, const uint8_t*, const uint8_t*, const float*,
                       const float*, int64_t, int64_t, void*);
extern "C" void fp6_dequantize(int, const uint8_t*, const uint8_t*, const float*, int64_t, const float*, int64_t, int64_t,
                               int64_t, void*, int);

int main() {
  const int64_t shapes[][3] = {{1, 1, 0}, {3, 5, 0}, {41, 300, 0}, {37, 513, 64}, {37, 993, 32}, {6, 769, 96}, {34, 1030, 128}};
  float values[64];
  for (int i = 0; i < 64; i++) values[i] = static_cast<float>(i % 32) / 4 * (i < 32 ? 1 : -1);
  int runs = 0;
  for (int path = 0; path < 5; path++) {
    if (!(fp6_paths() >> path & 1)) continue;
    for (const auto& [n, k, group] : shapes) {
      const int64_t strips = (n + 3) / 4, tiles = (k + 63) / 64, groups = group ? (k + group - 1) / group : 1;
      const std::vector<uint8_t> w4(strips * tiles * 128, 0x9C), w2(strips * tiles * 64, 0x63);
      const std::vector<float> scale(groups * n, 0.5f);
      for (int bf16 = 0; bf16 < 2; bf16++) {
        std::vector<char> weight(n * k * (bf16 ? 2 : 4));
        fp6_dequantize(path, w4.data(), w2.data(), scale.data(), n, values, n, k, group ? group : 0, weight.data(), bf16);
        for (int64_t m : {1, 2, 7, 17, 33, 64, 131}) {
          std::vector<char> x(m * k * (bf16 ? 2 : 4), 0x3D), out(m * n * (bf16 ? 2 : 4));
          fp6_mm(path, x.data(), bf16, bf16 ? 1 : 3, m, k, w4.data(), w2.data(), scale.data(), values, n, group, out.data());
          runs++;
        }
      }
    }
  }
  std::printf("clean: %d products\n", runs);
  return 0;
}
