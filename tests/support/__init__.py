"""What several test files share.

graphs.py       compilation that stops before code generation, and its graphs as short text
codegen.py      modules that Inductor generates for a GPU: run by Triton's interpreter, held to float64
kernels.py      the checks of a matrix kernel, interpreted or on a GPU
references.py   dequantized weights, and how close is close enough
models.py       small models
soak.py         how long soak tests are
checkpoints.py  folders with checkpoints: written, changed and signed again, read
"""
