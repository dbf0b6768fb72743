"""Every private name of torch._inductor that the lowerings use, so that a torch upgrade is a change to this file.

All of them are the same in torch 2.11, 2.13 and 2.15.
"""

from typing import Any

from torch._dynamo.device_interface import CudaInterface as _CudaInterface
from torch._dynamo.device_interface import device_interfaces as _device_interfaces
from torch._dynamo.device_interface import get_interface_for_device
from torch._inductor import config, output_code
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.constant_folding import ConstantFolder
from torch._inductor.cudagraph_utils import check_for_mutation_ignore_cuda_graph_managed_tensor
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FixedLayout, TensorBox
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import (
    AlgorithmSelectorCache,
    ExternKernelChoice,
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)
from torch._inductor.virtualized import V

__all__ = [
    "BENCHMARK_FUSION",
    "AlgorithmSelectorCache",
    "ConstantFolder",
    "CudaInterface",
    "ExternKernelChoice",
    "FixedLayout",
    "GraphLowering",
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
    "register_lowering",
]


def autotunes() -> bool:
    """Whether choices are timed: mode="max-autotune" and the settings behind it."""
    return bool(config.max_autotune or config.max_autotune_gemm)


# Whether a fused epilogue is timed before it is taken; renamed in torch 2.15.
BENCHMARK_FUSION = (
    "benchmark_template_fusion" if hasattr(config, "benchmark_template_fusion") else "benchmark_epilogue_fusion"
)

# As Any, because a subclass that answers otherwise is no subtype.
CudaInterface: Any = _CudaInterface


def device_interfaces() -> dict[str, Any]:
    """Inductor's registry of devices, filled."""
    get_interface_for_device("cuda")
    return _device_interfaces
