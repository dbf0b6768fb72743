"""The Triton kernel as machine code, compiled without a GPU: `python -m benchmarks.sass`.

cases     the problems that the kernel is compiled for, and how      <- start here
machine   compiling one kernel for a target, and reading its instructions
budget    the figures of each case and their limits; budget.json has what was accepted
"""
