"""Private names of Inductor: patterns, lowerings, templates, and the steps of a compilation that a fake GPU replaces.

All of them are the same in torch 2.11, 2.13 and 2.15, but for what a name or function here evens out.
"""

from typing import Any

from torch._dynamo.device_interface import CudaInterface as _CudaInterface
from torch._dynamo.device_interface import device_interfaces as _device_interfaces
from torch._dynamo.device_interface import get_interface_for_device
from torch._inductor import config, output_code, utils
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.constant_folding import ConstantFolder
from torch._inductor.cudagraph_utils import check_for_mutation_ignore_cuda_graph_managed_tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FixedLayout, TensorBox
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.pattern_matcher import (
    Arg,
    CallFunction,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch._inductor.runtime import hints
from torch._inductor.select_algorithm import (
    AlgorithmSelectorCache,
    ExternKernelChoice,
    SymbolicGridFn,
    TritonTemplate,
    realize_inputs,
)
from torch._inductor.select_algorithm import autotune_select_algorithm as _autotune_select_algorithm
from torch._inductor.virtualized import V
from torch.utils import _triton

__all__ = [
    "BENCHMARK_FUSION",
    "MODULES_WITH_DEVICE_CACHES",
    "AlgorithmSelectorCache",
    "Arg",
    "CallFunction",
    "ConstantFolder",
    "CudaInterface",
    "CustomGraphPass",
    "ExternKernelChoice",
    "FixedLayout",
    "GraphLowering",
    "KeywordArg",
    "Match",
    "PatternMatcherPass",
    "SymbolicGridFn",
    "TensorBox",
    "TritonTemplate",
    "V",
    "autotune_select_algorithm",
    "autotunes",
    "check_for_mutation_ignore_cuda_graph_managed_tensor",
    "compile_fx",
    "compile_fx_inner",
    "config",
    "device_interfaces",
    "fallback_handler",
    "get_hash_for_files",
    "lowerings",
    "output_code",
    "realize_inputs",
    "register_graph_pattern",
    "register_lowering",
]


# Whether a fused epilogue is timed before it is chosen; renamed in torch 2.15.
BENCHMARK_FUSION = (
    "benchmark_template_fusion" if hasattr(config, "benchmark_template_fusion") else "benchmark_epilogue_fusion"
)

# Modules whose functools caches hold answers about the device. All of these caches are of questions without side effects
# (unlike those of fx_passes, where a cache keeps a pattern from being registered twice).
MODULES_WITH_DEVICE_CACHES: tuple[Any, ...] = (utils, hints, _triton)

# As Any: a subclass whose methods have other signatures is no subtype.
CudaInterface: Any = _CudaInterface


def autotunes() -> bool:
    """Whether choices are timed: mode="max-autotune" and the settings behind it."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def autotune_select_algorithm(*args: Any, **kwargs: Any) -> Any:
    """The output of the best choice. From torch 2.12 on, Inductor's function returns the choice beside it."""
    chosen = _autotune_select_algorithm(*args, **kwargs)
    return chosen[0] if isinstance(chosen, tuple) else chosen


def device_interfaces() -> dict[str, Any]:
    """Inductor's registry of devices, filled."""
    get_interface_for_device("cuda")
    return _device_interfaces
