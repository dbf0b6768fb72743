"""The CPU kernel, in C++.

    build       compiles csrc/ at first use and loads it: it registers fp6::mm for CPUs
    quantize    calls of csrc/bit_planes/quantize.cpp

    csrc/fp6.h                what the parts share                                      <- start here
    csrc/op.cpp               fp6::mm for CPUs: checks, the choice of a path, ATen's matmul
    csrc/fp6.cpp              the driver: memory and threads
    csrc/formats.cpp          the values of every format's codes, as constants
    csrc/paths/rows.h         activations in, results out: rounding, splitting, transposing
    csrc/paths/strips.h       the loops, for any vector class: avx512_bf16, avx512, avx2, portable
    csrc/paths/amx/           matrix tiles, for more than a few rows of x
    csrc/bit_planes/          formats of other widths than six bits; quantizing; repacking

FP6_MAX_CPU_PATH in the environment (portable, avx2, avx512, avx512_bf16 or amx; read once) names the best path that may run,
as if the machine had none after it.
"""
