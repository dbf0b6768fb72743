// The quantizer over odd shapes, for the sanitizers: buffers are as large as the arguments say, and not a byte more.
#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" void fp6_quantize(const void*, int, int64_t, int64_t, int64_t, int64_t, int, int, float, uint8_t*, uint8_t*, float*);
extern "C" void fp6_repack(int, int64_t, int64_t, uint8_t*, uint8_t*, uint8_t*, uint8_t*);

int main() {
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 5}, {41, 300, 300}, {37, 513, 64}, {6, 769, 7}, {34, 1030, 1000}};
  int runs = 0;
  for (const auto& [n, k, group] : shapes)
    for (int dtype = 0; dtype < 3; dtype++)
      for (const int byte : {0x00, 0x3D, 0x7F, 0xFF}) {
        const std::vector<char> weight(n * k * (dtype == 2 ? 4 : 2), static_cast<char>(byte));
        const int64_t strips = (n + 3) / 4, tiles = (k + 63) / 64;
        std::vector<uint8_t> w4(strips * tiles * 128), w2(strips * tiles * 64);
        std::vector<float> scale((k + group - 1) / group * n);
        fp6_quantize(weight.data(), dtype, k, n, k, group, 3, 2, 28.0f, w4.data(), w2.data(), scale.data());
        std::vector<uint8_t> p4(n * ((k + 3) / 4) * 2), p2(n * ((k + 3) / 4));
        fp6_repack(1, n, k, p4.data(), p2.data(), w4.data(), w2.data());
        fp6_repack(0, n, k, p4.data(), p2.data(), w4.data(), w2.data());
        runs++;
      }
  std::printf("clean: %d weights\n", runs);
  return 0;
}
