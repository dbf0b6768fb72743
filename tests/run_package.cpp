// Runs a package of AOTInductor without Python: run_package LIBRARY PACKAGE ROWS FEATURES. LIBRARY is the one with fp6::mm. Prints
// the output for x = linspace(-1, 1) as [ROWS, FEATURES] in BF16, a number a line.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const int64_t rows = std::atoi(argv[3]), features = std::atoi(argv[4]);
  const at::Tensor x = at::linspace(-1, 1, rows * features).view({rows, features}).to(at::kBFloat16);
  const at::Tensor out = model.run({x})[0].to(at::kFloat).contiguous();
  for (int64_t i = 0; i < out.numel(); i++) std::printf("%.17g\n", out.const_data_ptr<float>()[i]);
}
