"""See the GPU path on a machine without a GPU: the code Inductor generates, its numbers, its machine code.

codegen.py    Inductor's real CUDA lowering over fake CUDA tensors; the generated module comes back as text
interpret.py  the same text run on CPU tensors by Triton's interpreter, in a subprocess
machine.py    one kernel compiled by Triton for a named target: registers, spills, instructions of the hot loop
fake_cuda.py  the pretended device behind codegen.py, and fake_tensors.py the tensors that live on it

None of the three needs a driver, and none says anything about speed.
"""
