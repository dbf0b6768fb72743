"""The GPU kernel.

unpack      words -> weights: the bias shift, in Triton or PTX        <- start here
mm          x @ weight.T with the weight in bit planes
dequantize  bit planes -> an ordinary weight
ptx         the PTX of unpack, generated from layouts/gpu_tiles.py
config      tiles and constants; imports no Triton
run         one launch with a given tile
"""
