// fp6::mm for CPUs, registered with torch when the library is loaded: no Python runs in a call. Which path, how activations
// go in, and ATen's matmul for many of them.
//
// Products with BF16 weights, which hold every code exactly, are exact in float. An FP16 activation is the sum of two BF16,
// a float one of three; each counts as a row of its own, and the sums are added up: no mantissa is lost.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string>

#include "formats.h"
#include "fp6.h"
#include "bit_planes/planes.h"

namespace {
using at::Tensor;
using std::optional;
using std::string;

constexpr int kAmx = 4, kBf16Path = 3;  // as numbered in fp6.cpp
constexpr int kAmxFrom = 2, kAmxFromInGroups = 4;  // rows from which AMX beats vdpbf16ps
constexpr int64_t kAtenFrom = 33;  // without AMX, from so many on ATen's matmul makes up for decoding for it
constexpr int64_t kAtenBlock = 1 << 21;  // weights decoded at a time for it: 4 MiB in 16 bits

std::vector<string> supported_paths() {
  std::vector<string> names;
  for (int i = 0; fp6::paths() >> i; i++)
    if (fp6::paths() >> i & 1) names.emplace_back(fp6::path_at(i).name);
  return names;
}

int path_named(std::string_view name) {
  for (int i = 0; fp6::paths() >> i; i++)
    if (fp6::paths() >> i & 1 && name == fp6::path_at(i).name) return i;
  TORCH_CHECK_VALUE(false, "fp6: path: got '", string(name), "', this machine has ", supported_paths());
}

int parts_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? 1 : dtype == at::kHalf ? 2 : dtype == at::kFloat ? 3 : 0;
}

// [groups, n] of a weight, from as many groups as k inputs need.
void check_groups(const Tensor& scale, int64_t k, optional<int64_t> group_size) {
  TORCH_CHECK_VALUE(group_size.value_or(1) > 0, "fp6: group_size: got ", *group_size, ", need 1 or more");
  const int64_t groups = group_size ? (k + *group_size - 1) / *group_size : 1;
  TORCH_CHECK_VALUE(scale.size(0) == groups, "fp6: scale has ", scale.size(0), " groups, ", k, " inputs in groups of ",
                    group_size.value_or(k), " need ", groups);
}

// x as [m, k]; k may be 0.
Tensor as_matrix(const Tensor& x) {
  return x.reshape({c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), x.size(-1)}).contiguous();
}

// The arguments of a call, checked and contiguous: what the kernel is told is what it may read.
struct Call {
  Tensor x, w4, w2, scale;
  const fp6::Format* format;
  int64_t m, k, n, group;
  bool grouped;

  Call(const Tensor& x_, at::TensorList planes, const Tensor& scale_, std::string_view name, optional<int64_t> group_size)
      : scale(scale_.contiguous()), format(fp6::format_named(name)) {
    TORCH_CHECK_VALUE(format && format->bits == 6, "fp6: format: got '", string(name), "', layout cpu.v1 is of six bits");
    TORCH_CHECK_VALUE(planes.size() == 2, "fp6: got ", planes.size(), " planes, layout cpu.v1 has w4 and w2");
    w4 = planes[0].contiguous(), w2 = planes[1].contiguous();
    TORCH_CHECK_VALUE(w4.scalar_type() == at::kByte && w2.scalar_type() == at::kByte && scale.scalar_type() == at::kFloat,
                      "fp6: w4, w2 and scale are ", w4.dtype(), ", ", w2.dtype(), " and ", scale.dtype(),
                      ", need uint8, uint8 and float32");
    TORCH_CHECK_VALUE(x_.dim() > 0 && scale.dim() == 2, "fp6: x and scale need 1 and 2 dimensions, have ", x_.dim(), " and ",
                      scale.dim());
    k = x_.size(-1), n = scale.size(1);
    check_groups(scale, k, group_size);
    x = as_matrix(x_), m = x.size(0);
    group = group_size.value_or(k), grouped = group < k;
    const int64_t strips = (n + fp6::kRows - 1) / fp6::kRows, tiles = (k + fp6::kTile - 1) / fp6::kTile;
    TORCH_CHECK_VALUE(w4.sizes() == at::IntArrayRef({strips, tiles, 2, fp6::kTile}) &&
                          w2.sizes() == at::IntArrayRef({strips, tiles, fp6::kTile}),
                      "fp6: w4 ", w4.sizes(), " and w2 ", w2.sizes(), " do not hold a weight [", n, ", ", k,
                      "] in layout cpu.v1");
  }
  // Groups may not end within 32 inputs, which the kernel multiplies at once.
  bool fits_kernel() const { return !grouped || group % fp6::kHalf == 0; }
  int best_path() const {
    const int best = 31 - __builtin_clz(fp6::paths());
    const int64_t rows = m * parts_of(x.scalar_type());
    return best == kAmx && rows < (grouped ? kAmxFromInGroups : kAmxFrom) ? kBf16Path : best;
  }
  fp6::Weight weight(int path) const {
    // Scaling weights instead of sums rounds them to BF16, which is all that BF16 activations ask for.
    const bool fold = path == kAmx && grouped && group % fp6::kTile == 0 && x.scalar_type() == at::kBFloat16;
    const int64_t tiles = w2.size(1);
    return {w4.const_data_ptr<uint8_t>(), w2.const_data_ptr<uint8_t>(), scale.const_data_ptr<float>(),
            format->values, n, n, tiles, k, grouped ? group : tiles * fp6::kTile, fold};
  }
};

// [m, n] by the kernel.
Tensor by_kernel(const Call& call, int path) {
  const at::ScalarType dtype = call.x.scalar_type();
  const bool bf16 = dtype == at::kBFloat16;
  const int parts = parts_of(dtype);
  const Tensor x = call.x.to(bf16 ? dtype : at::kFloat), out = at::empty({call.m, call.n}, x.options());
  fp6::mm(fp6::path_at(path), {x.const_data_ptr(), bf16, call.m, call.k, parts}, call.weight(path),
          {out.mutable_data_ptr(), bf16, call.m, call.n, parts});
  return out.to(dtype);
}

// What ATen multiplies in fastest: BF16 where the machine multiplies it (avx512_bf16 and amx), else float. Its BF16 and FP16
// matmuls are 4 to 5 times slower than its float one on AVX2, and FP16 weights could be infinite.
bool multiplies_in_bf16(at::ScalarType dtype) { return dtype == at::kBFloat16 && fp6::paths() >> kBf16Path; }

// [m, n] by at::linear, with blocks of rows that `decode(first, count, out, bf16)` writes into cache: values times scale,
// floats, or rounded once to BF16. Sums are rounded once to x's dtype.
template <class F>
Tensor by_blocks(const Tensor& x_, int64_t n, int64_t granularity, const F& decode) {
  const bool bf16 = multiplies_in_bf16(x_.scalar_type());
  const Tensor x = bf16 ? x_ : x_.to(at::kFloat);
  const int64_t k = x.size(1), step = std::max<int64_t>(1, kAtenBlock / k / granularity) * granularity;
  const Tensor out = at::empty({x.size(0), n}, x_.options());
  for (int64_t row = 0; row < n; row += step) {
    const int64_t count = std::min(step, n - row);
    const Tensor rows = at::empty({count, k}, x.options());
    decode(row, count, rows.mutable_data_ptr(), bf16);
    out.narrow(1, row, count).copy_(at::linear(x, rows));
  }
  return out;
}

Tensor by_blocks(const Call& call, int path) {
  return by_blocks(call.x, call.n, fp6::kRows, [&](int64_t row, int64_t count, void* rows, bool bf16) {
    fp6::dequantize(fp6::path_at(path), call.weight(path).from(row, count), rows, bf16);
  });
}

Tensor run(const Call& call, int path, bool blocks, at::IntArrayRef leading) {
  at::DimVector shape(leading.begin(), leading.end() - 1);
  shape.push_back(call.n);
  if (call.m == 0 || call.n == 0 || call.k == 0) return at::zeros(shape, call.x.options());
  return (blocks ? by_blocks(call, path) : by_kernel(call, path)).view(shape);
}

constexpr int64_t kFewRows = 8;  // of x: dot products; above, ATen's matmul makes up for writing the weight

// A weight in canonical planes, of any format, checked: what the kernel is told is what it may read.
struct InPlanes {
  std::vector<Tensor> held;  // contiguous planes, then the scale
  fp6::PlanesWeight weight{};

  InPlanes(int64_t k, at::TensorList planes, const Tensor& scale, const fp6::Format& format, optional<int64_t> group_size) {
    int bits = format.bits;
    TORCH_CHECK_VALUE(static_cast<int>(planes.size()) == __builtin_popcount(bits), "fp6: got ", planes.size(), " planes, ",
                      "e", format.exponent_bits, "m", format.mantissa_bits, " has ", __builtin_popcount(bits));
    TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat && scale.dim() == 2, "fp6: scale is ", scale.dtype(), " of ",
                      scale.sizes(), ", needs float32 [groups, n]");
    weight.n = scale.size(1), weight.k = k, weight.group = std::min(group_size.value_or(k), k);
    weight.exponent_bits = format.exponent_bits, weight.mantissa_bits = format.mantissa_bits;
    const int lanes = 8 / (bits & -bits);  // codes in a byte of the narrowest plane
    const int64_t padded = (k + lanes - 1) / lanes * lanes;
    for (size_t i = 0; i < planes.size(); i++) {
      const int width = 1 << (31 - __builtin_clz(bits));
      bits -= width;
      const Tensor& plane = held.emplace_back(planes[i].contiguous());
      const bool is_bytes = plane.scalar_type() == at::kByte && plane.dim() == 2 && plane.size(0) == weight.n;
      TORCH_CHECK(i > 0 || !is_bytes || plane.size(1) * 8 == padded * width, "fp6: x has ", k,
                  " features, but the weight was packed with ", plane.size(1) * 8 / width, " inputs, padding included");
      TORCH_CHECK_VALUE(is_bytes && plane.size(1) * 8 == padded * width, "fp6: w", width, " is ", plane.dtype(), " ",
                        plane.sizes(), ", does not hold a weight [", weight.n, ", ", k, "] in layout planes.v1");
      weight.planes[i] = plane.const_data_ptr<uint8_t>(), weight.strides[i] = plane.size(1), weight.widths[i] = width;
    }
    check_groups(scale, k, group_size);
    weight.scale = held.emplace_back(scale.contiguous()).const_data_ptr<float>();
  }
};

Tensor mm_in_planes(const Tensor& x_, const InPlanes& packed) {
  const fp6::PlanesWeight& w = packed.weight;
  at::DimVector shape(x_.sizes().begin(), x_.sizes().end() - 1);
  shape.push_back(w.n);
  if (x_.numel() == 0 || w.n == 0) return at::zeros(shape, x_.options());
  const at::ScalarType dtype = x_.scalar_type();
  const Tensor x = as_matrix(x_);
  if (x.size(0) <= kFewRows) {
    const Tensor floats = x.to(at::kFloat), sums = at::empty({x.size(0), w.n}, floats.options());
    fp6::mm(w, floats.const_data_ptr<float>(), x.size(0), sums.mutable_data_ptr<float>());
    return sums.to(dtype).view(shape);
  }
  return by_blocks(x, w.n, 1, [&](int64_t row, int64_t count, void* rows, bool bf16) {
           fp6::dequantize(w, row, count, rows, bf16);
         }).view(shape);
}

// What no kernel takes: other layouts, dtypes and formats.
Tensor by_rows(const Tensor& x, at::TensorList planes, const Tensor& scale, c10::string_view format, c10::string_view layout,
               optional<int64_t> group_size) {
  const auto op = c10::Dispatcher::singleton().findSchema({"fp6::mm_by_rows", ""});
  TORCH_CHECK_VALUE(op, "fp6: no kernel for x of ", x.dtype(), " by format '", string(format), "' in layout '",
                    string(layout), "' without Python; fp6_compile.ops has one for all");
  return op->typed<decltype(by_rows)>().call(x, planes, scale, format, layout, group_size);
}

Tensor mm(const Tensor& x, at::TensorList planes, const Tensor& scale, c10::string_view format, c10::string_view layout,
          optional<int64_t> group_size) {
  const fp6::Format* known = fp6::format_named(format);
  const bool readable = known && parts_of(x.scalar_type());
  if (readable && layout == "planes.v1" && x.dim() > 0)
    return mm_in_planes(x, InPlanes(x.size(-1), planes, scale, *known, group_size));
  if (!readable || layout != "cpu.v1") return by_rows(x, planes, scale, format, layout, group_size);
  const Call call(x, planes, scale, format, group_size);
  const int path = call.best_path();
  return run(call, path, !call.fits_kernel() || (path != kAmx && call.m >= kAtenFrom), x.sizes());
}

// A path by name, one way or the other: for tests and experiments.
Tensor mm_by(const Tensor& x, at::TensorList planes, const Tensor& scale, c10::string_view format,
             optional<int64_t> group_size, c10::string_view path, bool blocks) {
  const Call call(x, planes, scale, format, group_size);
  TORCH_CHECK_VALUE(parts_of(x.scalar_type()), "fp6: x: got ", x.dtype(), ", need float16, bfloat16 or float32");
  TORCH_CHECK_VALUE(blocks || call.fits_kernel(), "fp6: group_size: got ", call.group, ", the kernel takes multiples of 32");
  return run(call, path_named(path), blocks, x.sizes());
}

}  // namespace

// With or without ops.py, which defines the same `mm`: a program that runs an AOTInductor package loads this library alone.
TORCH_LIBRARY_FRAGMENT(fp6, library) {
  const auto is_known = [](const char* name) { return c10::Dispatcher::singleton().findSchema({name, ""}).has_value(); };
  if (is_known("fp6::cpu_mm")) return;  // loaded already, from another file
  library.set_python_module("fp6_compile.ops");
  if (!is_known("fp6::mm"))
    library.def("mm(Tensor x, Tensor[] planes, Tensor scale, str format, str layout, int? group_size) -> Tensor",
                {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
  library.def("cpu_paths() -> str[]", supported_paths);
  library.def(
      "cpu_mm(Tensor x, Tensor[] planes, Tensor scale, str format, int? group_size, str path, bool blocks)"
      " -> Tensor");
  library.impl("mm", torch::dispatch(at::kCPU, mm));
  library.impl("cpu_mm", torch::dispatch(at::kCPU, mm_by));
}
