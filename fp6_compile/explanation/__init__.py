"""`explain`: what torch.compile(model, backend="fp6") would do with a call, without doing it and without its GPU.

run           the function                                                            <- start here
request       the call as bytes that another process can read: code and structure, no values
settings      settings of torch that change what is compiled: grad mode, autocast, configurations
process       a new process that compiles the call for a fake GPU
trace         what runs in that process
values        what depends on the values of weights: errors and formats, computed where the weights are
result        what was found, as data
explanation   the same with its text, page and JSON: what `explain` returns
show          how a result is written as text, as HTML, and for rich
"""

from fp6_compile.explanation.explanation import Explanation
from fp6_compile.explanation.result import Break, CudaGraphs, Linear, Prediction
from fp6_compile.explanation.run import explain

__all__ = ["Break", "CudaGraphs", "Explanation", "Linear", "Prediction", "explain"]
