"""Every private name of torch._inductor that the lowerings use, so that a torch upgrade is a change to this file.

All of them are the same in torch 2.11, 2.13 and 2.15.
"""

from torch._inductor.ir import FixedLayout, TensorBox
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)

__all__ = [
    "FixedLayout",
    "SymbolicGridFn",
    "TensorBox",
    "TritonTemplate",
    "autotune_select_algorithm",
    "fallback_handler",
    "lowerings",
    "realize_inputs",
    "register_lowering",
]
