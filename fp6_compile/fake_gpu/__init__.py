"""A GPU that is not there, for `explain` and for tests: code is generated for it, nothing runs on it.

devices     GPUs by name: bandwidths, and what decides on their code
device      what Inductor asks of a CUDA device                     <- start here
driver      what Triton asks of its driver
attention   which attention kernel torch takes on a GPU
capture     the code that Inductor generates, read instead of loaded
"""
