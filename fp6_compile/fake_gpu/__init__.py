"""A fake GPU, for `explain` and for tests: code is generated for it, nothing runs on it.

devices     datasheet figures of GPUs, by name
device      what Inductor needs of a CUDA device                    <- start here
driver      what Triton needs of its driver
attention   which attention kernel torch chooses on a GPU
capture     the code that Inductor generates, kept as text instead of loaded
"""
