"""The CPU kernel: C++ (fp6.h is the place to start), compiled and loaded at first use (build), called by the dispatcher.

op.cpp              fp6::mm for CPUs: checks, the choice of a path, the vendor's matmul
fp6.cpp             the driver: memory and threads
rows.h              activations in, results out: rounding, splitting, transposing
strips.h            the loops, for any vector class: avx512_bf16, avx512, avx2, portable
amx.cpp             matrix tiles, for more than a few activations
"""
