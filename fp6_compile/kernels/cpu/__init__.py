"""The CPU kernel: C++ (fp6.h is the place to start), compiled and loaded at first use (build), called by the dispatcher.

op.cpp              fp6::mm for CPUs: checks, the choice of a path, ATen's matmul
fp6.cpp             the driver: memory and threads
formats.cpp         the values of every format's codes, as constants
rows.h              activations in, results out: rounding, splitting, transposing
strips.h            the loops, for any vector class: avx512_bf16, avx512, avx2, portable
amx.cpp             matrix tiles, for more than a few activations
planes.cpp          formats of other widths than six bits
quantize.cpp        weights to tiles, tiles to canonical planes and back (quantize.py)

FP6_MAX_CPU_PATH in the environment (portable, avx2, avx512, avx512_bf16 or amx; read once) names the best path that may run,
as if the machine had none after it.
"""
