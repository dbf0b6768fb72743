"""See the GPU path on a machine without a GPU: the code Inductor generates, its numbers, its machine code.

codegen.py    Inductor's real CUDA lowering over fake CUDA tensors; the generated module comes back as text
interpret.py  the same text run on CPU tensors by Triton's interpreter, in a subprocess
fake_cuda.py  the fake device behind codegen.py, fake_tensors.py the tensors that live on it, attention.py its attention

The third way, machine code, is benchmarks/sass/machine.py: one kernel compiled by Triton for a named target, its registers,
spills and instructions. None of the three needs a driver, and none says anything about speed.
"""
