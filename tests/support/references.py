"""What outputs are compared with: dequantized weights, and how close is close enough."""

from __future__ import annotations

import torch
from torch import nn

from fp6_compile.formats import DEFAULT, FORMATS
from fp6_compile.quantize import dequantize, quantize

# The formats that kernels have tables for.
SIX_BITS = {name: FORMATS[name] for name in ("e3m2", "e2m3")}


def dequantized_(model: nn.Module, names: list[str], fmt: str = DEFAULT, group_size: int | None = None) -> nn.Module:
    """The same model with the named parameters replaced by what their six bits stand for: the reference for outputs.

    A name that ends in "^T" is a parameter [K, N], as Conv1D's.
    """
    for name in names:
        parameter = model.get_parameter(name.removesuffix("^T"))
        w = parameter.detach().T if name.endswith("^T") else parameter.detach()
        value = dequantize(*quantize(w, FORMATS[fmt], group_size), FORMATS[fmt], group_size, w.dtype)
        with torch.no_grad():
            parameter.copy_(value.T if name.endswith("^T") else value)
    return model


def quantized_names(model, report):
    """Parameter names of the linears that were taken; Conv1D's are transposed; a tied head is its embedding."""
    for linear in report.quantized:
        module = model.get_submodule(linear.name)
        mark = "^T" if type(module).__name__ == "Conv1D" else ""
        yield f"{linear.name}.weight{mark}"


def untie(model):
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def close(actual: torch.Tensor, expected: torch.Tensor, roundings: int = 4) -> None:
    """Equal but for some roundings to the compute dtype, of the largest value around: the two sum in different orders."""
    atol = roundings * torch.finfo(expected.dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
