"""Six-bit matmuls on a GPU beside cuBLAS and others: `python -m benchmarks.linear`.

bench      the run: problems, copies of weights, rows                      <- start here
providers  who multiplies: this package, cuBLAS, other packages
shapes     weights of language models
timing     time on a device, in two ways
results    files of results, written row by row
simulate   predicted times, without a GPU
"""
