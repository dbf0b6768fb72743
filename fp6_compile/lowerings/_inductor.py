"""Every private name of torch._inductor that the lowerings use, so that a torch upgrade is a change to this file.

All of them are the same in torch 2.11, 2.13 and 2.15.
"""

from torch._inductor import config
from torch._inductor.ir import FixedLayout, TensorBox
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import (
    ExternKernelChoice,
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V

__all__ = [
    "ExternKernelChoice",
    "FixedLayout",
    "SymbolicGridFn",
    "TensorBox",
    "TritonTemplate",
    "V",
    "autotune_select_algorithm",
    "autotunes",
    "fallback_handler",
    "lowerings",
    "realize_inputs",
    "register_lowering",
]


def autotunes() -> bool:
    """Whether choices are timed: mode="max-autotune" and the settings behind it."""
    return bool(config.max_autotune or config.max_autotune_gemm)
