"""The kernels that a compiled graph launches at each call, read from the module that Inductor generated for it.

A launch is a call of a generated kernel (Triton's on a GPU, C++ on a CPU), of a library (`extern_kernels.mm`) or of an
operator (`torch.ops.fp6.mm.default`, attention), or a copy of one tensor into another. An operator is counted once, whatever
it launches.
"""

from __future__ import annotations

import ast
import re

_LIBRARIES = ("extern_kernels.", "torch.ops.", "aten.", "_quantized.")


def launches(code: str) -> list[str]:
    """Names of the kernels that `code` launches in one call, in their order, as often as they are launched.

    Raises SyntaxError for code that is not Python, as of Inductor's C++ wrapper.
    """
    module = ast.parse(code)
    kernels = {
        target.id
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("async_compile.")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and _is_step(node.name)]
    calls = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    names = [ast.unparse(call.func) for call in calls]
    return [name.removesuffix(".run") for name in names if _is_launch(name, kernels)]


def _is_step(function: str) -> bool:
    """Whether each call runs it: with CUDA graphs what can be recorded is in functions of its own."""
    return re.fullmatch(r"call|partition_\d+", function) is not None


def _is_launch(name: str, kernels: set[str]) -> bool:
    return name.removesuffix(".run") in kernels or name.startswith(_LIBRARIES) or name.endswith(".copy_")
