// The values of all codes of all formats, computed by the compiler: the same as Format.values of formats.py gives.
#include "formats.h"

#include <limits>

namespace {
using fp6::Format;

constexpr int kExponents = 5, kMantissas = 7;  // a format has 1 to 5 exponent bits, 0 to 6 of mantissa

constexpr float scaled_by_two(float value, int times) {
  for (; times > 0; times--) value *= 2;
  for (; times < 0; times++) value /= 2;
  return value;
}

// A magnitude. The all-ones exponent is an ordinary one, but with five bits, where it is IEEE's.
constexpr float value_of(int code, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
  if (exponent == 31)
    return mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  const int steps = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
  return scaled_by_two(static_cast<float>(steps), (exponent ? exponent : 1) - bias - mantissa_bits);
}

constexpr Format make(int exponent_bits, int mantissa_bits) {
  Format format{exponent_bits, mantissa_bits, 1 + exponent_bits + mantissa_bits, 0, {}};
  const int magnitudes = 1 << (exponent_bits + mantissa_bits);
  for (int code = 0; code < magnitudes; code++) {
    const float value = value_of(code, exponent_bits, mantissa_bits);
    format.values[code] = value, format.values[code + magnitudes] = -value;
    if (value < std::numeric_limits<float>::infinity()) format.max = value;  // they ascend
  }
  return format;
}

struct Table {
  Format formats[kExponents][kMantissas];  // [exponent bits - 1][mantissa bits]
};

constexpr bool known(int exponent_bits, int mantissa_bits) {
  const int bits = 1 + exponent_bits + mantissa_bits;
  return exponent_bits >= 1 && exponent_bits <= kExponents && mantissa_bits >= 0 && bits >= 3 && bits <= 8;
}

constexpr Table make_all() {
  Table table{};
  for (int e = 1; e <= kExponents; e++)
    for (int m = 0; m < kMantissas; m++)
      if (known(e, m)) table.formats[e - 1][m] = make(e, m);
  return table;
}

constexpr Table kTable = make_all();

}  // namespace

const Format* fp6::format_named(std::string_view name) {
  if (name.size() != 4 || name[0] != 'e' || name[2] != 'm') return nullptr;
  const int e = name[1] - '0', m = name[3] - '0';
  return known(e, m) ? &kTable.formats[e - 1][m] : nullptr;
}
