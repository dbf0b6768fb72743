"""From a weight to its bit planes and scales, by the fastest way that its device has."""

from __future__ import annotations

from torch import Tensor

from fp6_compile.formats import Format
from fp6_compile.kernels.cpu import quantize as cpu
from fp6_compile.layouts.packing import CPU, pack_quantized


def quantized(weight: Tensor, fmt: Format, layout: str, group_size: int | None, scale: str) -> tuple[Tensor, ...]:
    """(*planes, scale) of `weight` [N, K]. Raises ValueError as quantize.quantize does."""
    if layout == CPU and scale == "absmax" and (fast := cpu.quantize(weight, fmt, group_size)):
        return fast
    planes, scales = pack_quantized(weight, fmt, layout, group_size, scale)
    return *planes, scales
