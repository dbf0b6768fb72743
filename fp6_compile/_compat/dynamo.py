"""Private names of Dynamo and of torch.compile. Importing this module imports Inductor and, where it is installed, Triton.

All of them are the same in torch 2.11, 2.13 and 2.15, but for what a function here evens out.
"""

from typing import Any

from torch import _TorchCompileInductorWrapper as TorchCompileInductorWrapper
from torch._dynamo import config, convert_frame, eval_frame
from torch._dynamo.backends import registry
from torch._dynamo.output_graph import graph_break_reasons
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

__all__ = [
    "CONVERT_FRAME",
    "EVAL_FRAME",
    "TorchCompileInductorWrapper",
    "config",
    "counters",
    "functorch_config",
    "graph_break_reasons",
    "registry",
    "source_name",
]

# The modules whose frames are on the call stack while Dynamo compiles: its outermost one, and what traces a frame, in a
# function that has it as its variable `frame`.
EVAL_FRAME = eval_frame.__name__
CONVERT_FRAME = convert_frame.__name__


def source_name(source: Any) -> str:
    """The Python expression of one of Dynamo's sources; "" for None. A method in torch 2.11, a property from 2.12 on."""
    name = getattr(source, "name", "")
    return name if isinstance(name, str) else name()
