// The CPU kernel without torch, for the sanitizers: every path of this machine, every format, and the quantizer, over odd
// shapes and from several threads at once, which are also the first to call it. Buffers are as large as the arguments say,
// and not a byte more; what is computed is the same in every thread, bit for bit.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "formats.h"
#include "fp6.h"
#include "bit_planes/planes.h"

extern "C" void fp6_quantize(const void*, int, int64_t, int64_t, int64_t, int64_t, int, int, float, uint8_t*, uint8_t*, float*);
extern "C" void fp6_repack(int, int64_t, int64_t, uint8_t*, uint8_t*, uint8_t*, uint8_t*);

namespace {

// [n, k] and the group size, 0 for rows.
constexpr int64_t kShapes[][3] = {{1, 1, 0},   {3, 5, 0},     {41, 300, 0}, {37, 513, 64},  {6, 769, 96},
                                  {9, 993, 32}, {34, 270, 128}, {5, 64, 32},  {70, 128, 64}, {9, 127, 4096}};
constexpr const char* kSixBits[] = {"e3m2", "e2m3", "e5m0", "e1m4"};

// What one thread has computed.
struct Results {
  int runs = 0;
  uint64_t digest = 14695981039346656037u;

  template <class T>
  void take(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); i++) digest = (digest ^ bytes[i]) * 1099511628211u;
    runs++;
  }
};

std::vector<uint8_t> random_bytes(int64_t count) {
  std::vector<uint8_t> bytes(count);
  uint32_t state = 1;
  for (auto& byte : bytes) byte = static_cast<uint8_t>((state = state * 1664525u + 1013904223u) >> 24);
  return bytes;
}

// Halfs, BF16 (dtype 0 and 1) or floats (2): all of one bit pattern that is a number in each.
std::vector<uint8_t> activations(int64_t count, int dtype) { return std::vector<uint8_t>(count * (dtype == 2 ? 4 : 2), 0x3D); }

void run_path(const fp6::Path& path, const char* name, int64_t n, int64_t k, int64_t group, Results& results) {
  const int64_t strips = (n + 3) / 4, tiles = (k + 63) / 64, groups = group ? (k + group - 1) / group : 1;
  const auto w4 = random_bytes(strips * tiles * 128), w2 = random_bytes(strips * tiles * 64);
  const std::vector<float> scale(groups * n, 0.5f);
  for (int bf16 = 0; bf16 < 2; bf16++) {
    const bool fold = bf16 && group && group < k && group % 64 == 0;
    const int64_t shared = group && group < k ? group : tiles * 64;
    const fp6::Weight w{w4.data(), w2.data(), scale.data(), fp6::format_named(name)->values, n, n, tiles, k, shared, fold};
    std::vector<uint8_t> weight(n * k * (bf16 ? 2 : 4));
    fp6::dequantize(path, w, weight.data(), bf16);
    results.take(weight);
    for (int64_t m : {1, 2, 7, 17, 33, 200}) {
      const auto x = activations(m * k, bf16 ? 1 : 2);
      std::vector<uint8_t> out(m * n * (bf16 ? 2 : 4));
      for (int parts = bf16 ? 1 : 2; parts < (bf16 ? 2 : 4); parts++) {
        fp6::mm(path, {x.data(), bf16 != 0, m, k, parts}, w, {out.data(), bf16 != 0, m, n, parts});
        results.take(out);
      }
    }
  }
}

// Groups of any size.
void run_planes(const fp6::Format& format, int64_t n, int64_t k, int64_t group, Results& results) {
  fp6::PlanesWeight w{};
  std::vector<std::vector<uint8_t>> planes;
  const int lanes = 8 / (format.bits & -format.bits);
  for (int width = 8; width; width /= 2)
    if (format.bits & width) {
      const int i = static_cast<int>(planes.size());
      w.widths[i] = width, w.strides[i] = (k + lanes - 1) / lanes * lanes * width / 8;
      planes.push_back(random_bytes(n * w.strides[i]));
      w.planes[i] = planes.back().data();
    }
  w.exponent_bits = format.exponent_bits, w.mantissa_bits = format.mantissa_bits;
  w.n = n, w.k = k, w.group = group && group < k ? group : k;
  const std::vector<float> scale((k + w.group - 1) / w.group * n, 0.5f);
  w.scale = scale.data();
  for (int64_t m : {1, 3, 8}) {
    const std::vector<float> x(m * k, 0.75f);
    std::vector<float> out(m * n);
    fp6::mm(w, x.data(), m, out.data());
    results.take(out);
  }
  for (int bf16 = 0; bf16 < 2; bf16++) {
    std::vector<uint8_t> rows((n - n / 3) * k * (bf16 ? 2 : 4));
    fp6::dequantize(w, n / 3, n - n / 3, rows.data(), bf16);
    results.take(rows);
  }
}

void run_quantizer(int64_t n, int64_t k, int64_t group, Results& results) {
  for (int dtype = 0; dtype < 3; dtype++)
    for (const int byte : {0x00, 0x7F, -1}) {
      const int64_t bytes = n * k * (dtype == 2 ? 4 : 2);
      const auto weight = byte < 0 ? random_bytes(bytes) : std::vector<uint8_t>(bytes, byte);
      const int64_t strips = (n + 3) / 4, tiles = (k + 63) / 64;
      std::vector<uint8_t> w4(strips * tiles * 128), w2(strips * tiles * 64);
      std::vector<float> scale((k + group - 1) / group * n);
      fp6_quantize(weight.data(), dtype, k, n, k, group, 3, 2, 28.0f, w4.data(), w2.data(), scale.data());
      results.take(w4), results.take(w2), results.take(scale);
      std::vector<uint8_t> p4(n * ((k + 3) / 4) * 2), p2(n * ((k + 3) / 4));
      fp6_repack(1, n, k, p4.data(), p2.data(), w4.data(), w2.data());
      fp6_repack(0, n, k, p4.data(), p2.data(), w4.data(), w2.data());
      results.take(p4), results.take(p2), results.take(w4), results.take(w2);
    }
}

Results run_all() {
  Results results;
  int shape = 0, format = 0;
  for (const auto& [n, k, group] : kShapes) {
    for (int number = 0; fp6::paths() >> number; number++)
      if (fp6::paths() >> number & 1) run_path(fp6::path_at(number), kSixBits[shape % 4], n, k, group, results);
    for (char e = '1'; e <= '5'; e++)
      for (char m = '0'; m <= '6'; m++)
        if (const fp6::Format* known = fp6::format_named(std::string{'e', e, 'm', m}))
          run_planes(*known, n, k, format++ % 2 ? group : 7, results);
    for (const int64_t size : {k, int64_t{7}}) run_quantizer(n, k, size < k ? size : k, results);
    shape++;
  }
  return results;
}

}  // namespace

int main(int, char** arguments) {
  std::vector<Results> results(std::atoi(arguments[1]));
  std::vector<std::thread> threads;
  for (auto& result : results) threads.emplace_back([&result] { result = run_all(); });
  for (auto& thread : threads) thread.join();
  for (const auto& result : results)
    if (result.digest != results[0].digest) return std::puts("threads differ"), 1;
  std::printf("clean: %zu threads, %d results each, paths %d\n", results.size(), results[0].runs, fp6::paths());
  return 0;
}
