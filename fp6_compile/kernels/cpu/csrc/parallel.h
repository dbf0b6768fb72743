// at::parallel_for: torch's own threads.
#pragma once
#include <cstdint>

#ifdef FP6_WITHOUT_TORCH  // the sanitizers' build: always a second thread, one that they see
#include <thread>
namespace at {
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  const int64_t middle = begin + (end - begin) / 2;
  std::thread other([&] {
    if (begin < middle) f(begin, middle);
  });
  if (middle < end) f(middle, end);
  other.join();
}
}  // namespace at
#else
#include <ATen/Parallel.h>
#endif
