"""The kernels, and which of them runs.

    triton      the GPU kernel: unpack, multiply, dequantize       <- start here
    selection   which tile it runs with, by shape and device
    cpu         the CPU kernel, in C++
    pack        from a weight to bit planes and scales

Nothing outside of this package may import its Triton modules when it is imported: Triton need not be installed.
"""
