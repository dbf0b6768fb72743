// The formats of formats.py, as constants: known before the kernel is registered, whichever thread calls it first.
#pragma once
#include <string_view>

namespace fp6 {

struct Format {
  int exponent_bits, mantissa_bits;
  int bits;           // of a code
  float max;          // the largest value that `encode` gives
  float values[256];  // by code, 2^bits of them
};

// "e3m2" and its like: three to eight bits, one to five of them an exponent. Null for any other name.
const Format* format_named(std::string_view name);

}  // namespace fp6
