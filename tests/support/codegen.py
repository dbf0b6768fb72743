"""Modules that Inductor generates for a GPU: run by Triton's interpreter, and held to float64."""

import torch
import torch.nn.functional as F

from fp6_compile.formats import FORMATS
from fp6_compile.quantize import dequantize, quantize
from tests.deviceless.interpret import run_interpreted_all


def swiglu_reference(model, x, fmt="e2m3", group_size=None):
    """In float64, with what the six bits stand for."""
    w = [
        dequantize(*quantize(layer.weight, FORMATS[fmt], group_size), FORMATS[fmt], group_size, torch.float64)
        for layer in (model.gate, model.up, model.down)
    ]
    x = x.double()
    hidden = F.silu(x @ w[0].T + model.gate.bias.double()) * (x @ w[1].T)
    return x + hidden @ w[2].T


def check(actual, expected, dtype):
    """Three intermediate results and the output are rounded to dtype: gate, hidden (twice), down, sum.

    Each is off by at most eps / 2 of its own size, and enters the output with a weight of order one; sums are float32.
    """
    assert actual.dtype == dtype
    bound = 3 * torch.finfo(dtype).eps * expected.abs().max()
    assert (actual.double() - expected).abs().max() <= bound


def interpret(modules):
    """The modules' outputs. Inline PTX cannot be interpreted; its plain twin can (test_kernels_unpack.py: they agree)."""
    asm, twin = "USE_ASM : tl.constexpr = True", "USE_ASM : tl.constexpr = False"
    assert all(asm in module.code or "accumulate" not in module.code for module in modules)
    return run_interpreted_all([(module.code.replace(asm, twin), module.inputs) for module in modules])
