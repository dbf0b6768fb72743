"""Weights on a CPU to tiles and scales, in C++: the same bits as quantize.quantize and packing.pack, ten times faster."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fp6_compile.formats import Format
from fp6_compile.kernels.cpu.build import library
from fp6_compile.packing import TILE_K, TILE_ROWS

# As numbered in quantize.cpp.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize(weight: Tensor, fmt: Format, group_size: int | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """(w4, w2, scale) of `weight` [N, K] in layout "cpu.v1", scales by absmax.

    None where there is no library, for a dtype other than float16, bfloat16 and float32, an empty weight, and one with
    values that are not finite: the caller's own way handles these.
    """
    n, k = weight.shape
    if weight.dtype not in _DTYPES or weight.numel() == 0 or fmt.bits != 6 or library() is None:
        return None
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    group = min(group_size or k, k)
    strips, tiles = -(-n // TILE_ROWS), -(-k // TILE_K)
    w4, w2 = (torch.empty(strips, tiles, *shape, dtype=torch.uint8) for shape in ((2, TILE_K), (TILE_K,)))
    scale = torch.empty(-(-k // group), n)
    _function()(
        *(weight.data_ptr(), _DTYPES.index(weight.dtype), weight.stride(0), n, k, group),
        *(fmt.exponent_bits, fmt.mantissa_bits, fmt.max, w4.data_ptr(), w2.data_ptr(), scale.data_ptr()),
    )
    return (w4, w2, scale) if scale.isfinite().all() else None


@functools.cache
def _function() -> Any:
    types = {"i": ctypes.c_int, "p": ctypes.c_void_p, "q": ctypes.c_int64, "f": ctypes.c_float}
    function = library().fp6_quantize  # type: ignore[union-attr]
    function.argtypes, function.restype = [types[t] for t in "piqqqqiifppp"], None
    return function
