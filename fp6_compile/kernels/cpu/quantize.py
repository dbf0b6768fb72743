"""On a CPU, in C++: weights to tiles, and tiles to canonical planes and back; the bits of quantize.py and packing.py."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp6_compile.formats import Format
from fp6_compile.kernels.cpu.build import library
from fp6_compile.layouts.packing import CPU, PLANES, TILE_K, TILE_ROWS

# As numbered in quantize.cpp.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize(weight: Tensor, fmt: Format, group_size: int | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """(w4, w2, scale) of `weight` [N, K] in layout "cpu.v1", scales by absmax.

    None where there is no library, for a dtype other than float16, bfloat16 and float32, an empty weight, a fake one, and
    one with values that are not finite: the caller's own way handles these.
    """
    n, k = weight.shape
    if weight.dtype not in _DTYPES or weight.numel() == 0 or fmt.bits != 6 or fmt.exponent_bits == 5:
        return None
    weight = weight.resolve_neg()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    group = min(group_size or k, k)
    w4, w2 = _empty(_tile_shapes(n, k))
    scale = torch.empty(-(-k // group), n, dtype=torch.float32, device="cpu")
    if not _in_memory(weight, w4, w2, scale) or library() is None:
        return None
    _function("fp6_quantize")(
        *(weight.data_ptr(), _DTYPES.index(weight.dtype), weight.stride(0), n, k, group),
        *(fmt.exponent_bits, fmt.mantissa_bits, fmt.max, w4.data_ptr(), w2.data_ptr(), scale.data_ptr()),
    )
    return (w4, w2, scale) if scale.isfinite().all() else None


def repack(planes: Sequence[Tensor], source: str, target: str, n: int, k: int) -> tuple[Tensor, Tensor] | None:
    """Planes of a weight [n, k] in the other of the layouts "planes.v1" and "cpu.v1"; None for other layouts."""
    if {source, target} != {PLANES, CPU} or len(planes) != 2 or 0 in (n, k):
        return None
    shapes = {CPU: _tile_shapes(n, k), PLANES: ((n, -(-k // 4) * 2), (n, -(-k // 4)))}
    given = tuple(plane.contiguous() for plane in planes)
    made = _empty(shapes[target])
    known = (
        all(plane.dtype == torch.uint8 for plane in given) and tuple(tuple(p.shape) for p in given) == shapes[source]
    )
    if not known or not _in_memory(*given, *made) or library() is None:
        return None
    canonical, tiles = (given, made) if source == PLANES else (made, given)
    _function("fp6_repack")(target == PLANES, n, k, *(plane.data_ptr() for plane in (*canonical, *tiles)))
    return made[0], made[1]


def _empty(shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.empty(shape, dtype=torch.uint8, device="cpu") for shape in shapes)


def _in_memory(*tensors: Tensor) -> bool:
    """Whether C++ may read all of them: fake tensors, which FakeTensorMode also makes of real ones, are nowhere."""
    return all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)


def _tile_shapes(n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    strips, tiles = -(-n // TILE_ROWS), -(-k // TILE_K)
    return (strips, tiles, 2, TILE_K), (strips, tiles, TILE_K)


_ARGUMENTS = {"fp6_quantize": "piqqqqiifppp", "fp6_repack": "iqqpppp"}


@functools.cache
def _function(name: str) -> Any:
    types = {"i": ctypes.c_int, "p": ctypes.c_void_p, "q": ctypes.c_int64, "f": ctypes.c_float}
    function = getattr(library(), name)
    function.argtypes, function.restype = [types[t] for t in _ARGUMENTS[name]], None
    return function
