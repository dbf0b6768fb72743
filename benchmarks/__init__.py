"""Measurements, each beside alternatives in the same run. A package is a command of its name, too.

first        the first quarter of an hour on a GPU: exactness, then times
all          everything that is measured on a GPU machine
linear       matmuls on a GPU; plots draws them, tune finds the fastest tile
plots
tune
cpu          matmuls on a CPU
sass         the Triton kernel's machine code against a budget, without a GPU
decode       milliseconds per token of whole models
accuracy     what formats and algorithms cost in quality
formats      SQNR of formats on the shipped model's weights
packing      memory and time of quantize_, save and load
calibration  memory and time of calibrate_
serving      vLLM's tokens of packed models beside those of the dequantized ones
fingerprint  hashes of everything that the package computes, to compare two commits
system       versions, bandwidth and memory of the machine
results      files of results; predictions are not among them
"""
