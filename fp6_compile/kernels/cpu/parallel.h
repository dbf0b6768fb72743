// at::parallel_for: torch's own threads.
#pragma once
#include <cstdint>

#ifdef FP6_SERIAL  // the sanitizers' build, without torch
namespace at {
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  f(begin, end);
}
}  // namespace at
#else
#include <ATen/Parallel.h>
#endif
