"""See the GPU path on a machine without a GPU: the code Inductor generates, its numbers, its machine code.

codegen.py    Inductor's real CUDA lowering over fake CUDA tensors; the generated module comes back as text
interpret.py  the same text run on CPU tensors by Triton's interpreter, in a subprocess
pool.py       functions of Triton kernels, run by the interpreter in one process that serves all tests

Behind them: fake_cuda.py is the fake device of fp6_compile.fake_gpu with tensors that have values (fake_tensors.py);
interpreter.py is the process of interpret.py; interpreter_fixes.py corrects what Triton's interpreter gets wrong, and
bf16_probe.py shows that it does; attention.py is attention for the interpreter. toy.py and toy_kernel.py are what the tests
of all this compile.

The third way, machine code, is benchmarks/sass/machine.py: one kernel compiled by Triton for a named target, its registers,
spills and instructions. None of the three needs a driver, and none says anything about speed.
"""
