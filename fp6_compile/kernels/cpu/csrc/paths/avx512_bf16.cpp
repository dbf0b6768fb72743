// AVX-512 with VBMI and BF16, up to any M; see avx512_bf16.h.
#include "paths/avx512_bf16.h"

const fp6::Path fp6::avx512_bf16 = {"avx512_bf16", fp6::Order::kBf16, prepare_bf16,
                                    mm_by_strips<Bf16>, write, dequantize_strips<Bf16>};
