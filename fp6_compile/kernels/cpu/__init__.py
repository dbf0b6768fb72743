"""The CPU kernel: C++ (fp6.h is the place to start), compiled at first use (build), called through ctypes (mm).

fp6.cpp             the driver: activations, threads, rounding
strips.h            the loops, for any vector class: avx512_bf16, avx512, avx2, portable
amx.cpp             matrix tiles, for more than a few activations
"""
