"""Calls of the C++ kernel: which of its paths, how activations go in, and the vendor's matmul for many of them.

Products with BF16 weights, which hold every code exactly, are exact in float32. An FP16 activation is the sum of two BF16,
a float32 one of three; each counts as an activation of its own, and the sums are added up: no mantissa is lost.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile.formats import Format
from fp6_compile.kernels.cpu.build import library
from fp6_compile.packing import CPU, TILE_K, TILE_ROWS

# As numbered in fp6.cpp.
PATHS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
# BF16 that an activation is the sum of.
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# From how many rows (of parts) on AMX beats vdpbf16ps: without groups, and with (tiles leave their registers by group).
_AMX_FROM = {False: 2, True: 5}
# Without AMX, from this many activations on, decoding rows for the vendor's matmul costs less than our own.
_VENDOR_FROM = 33
# Rows decoded at a time for it: 1 MiB in 16 bits.
_BLOCK = 1 << 19


@functools.cache
def supported_paths() -> tuple[str, ...]:
    """The paths that this machine runs, slowest first; none without a library. Asks Linux for AMX's registers."""
    lib = library()
    bits = lib.fp6_paths() if lib is not None else 0
    return tuple(name for i, name in enumerate(PATHS) if bits >> i & 1)


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether `mm` takes activations of `dtype` on this machine."""
    return dtype in PARTS and bool(supported_paths())


def mm(x: Tensor, w4: Tensor, w2: Tensor, scale: Tensor, fmt: Format, group_size: int | None) -> Tensor:
    """x @ weight.T.

    Args:
        x: [M, K], float16, bfloat16 or float32, any strides.
        w4, w2: the weight [N, K] in layout "cpu.v1".
        scale: [G, N] float32; G is 1 when group_size is None.
        fmt: the format of the codes.
        group_size: inputs per scale, any number.

    Returns:
        [M, N], contiguous, of x's dtype.
    """
    m, k = x.shape
    n = scale.shape[1]
    if 0 in (m, n, k):
        return x.new_zeros(m, n)
    path = _choose(m * PARTS[x.dtype], grouped=scale.shape[0] > 1)
    weight = Weight(w4.contiguous(), w2.contiguous(), scale.contiguous(), fmt, group_size)
    weight.check(k)
    if weight.has_odd_groups(k) or (path != "amx" and m >= _VENDOR_FROM):
        return by_blocks(path, x, weight)
    return by_kernel(path, x, weight)


def _choose(rows: int, grouped: bool) -> str:
    paths = supported_paths()
    return "avx512_bf16" if paths[-1] == "amx" and rows < _AMX_FROM[grouped] else paths[-1]


@dataclass
class Weight:
    """A packed weight, all of it contiguous."""

    w4: Tensor
    w2: Tensor
    scale: Tensor
    fmt: Format
    group_size: int | None

    def check(self, k: int) -> None:
        """Refuse what would make the kernel read outside of its tensors."""
        shape, n = (-(-self.scale.shape[1] // TILE_ROWS), -(-k // TILE_K)), self.scale.shape[1]
        if self.w4.shape != (*shape, 2, TILE_K) or self.w2.shape != (*shape, TILE_K):
            raise ValueError(
                f"fp6: w4 {list(self.w4.shape)} and w2 {list(self.w2.shape)} do not hold a weight [{n}, {k}] in layout {CPU}"
            )
        dtypes = (self.w4.dtype, self.w2.dtype, self.scale.dtype)
        if dtypes != (torch.uint8, torch.uint8, torch.float32):
            raise ValueError(f"fp6: w4, w2 and scale are {dtypes}, need uint8, uint8 and float32")

    def has_odd_groups(self, k: int) -> bool:
        """Whether groups end within 32 inputs, which the kernel multiplies at once."""
        return self.group_size is not None and self.group_size < k and self.group_size % 32 != 0


def by_kernel(path: str, x: Tensor, weight: Weight) -> Tensor:
    """`mm` by `path` of the C++ kernel, which must be supported. Groups are of multiples of 32."""
    (m, k), n = x.shape, weight.scale.shape[1]
    bf16 = x.dtype == torch.bfloat16
    source = (x if bf16 else x.float()).contiguous()
    out = torch.empty(m, n, dtype=source.dtype)
    _function("fp6_mm")(
        *(PATHS.index(path), source.data_ptr(), bf16, PARTS[x.dtype], m, k),
        *(weight.w4.data_ptr(), weight.w2.data_ptr(), weight.scale.data_ptr(), _values(weight.fmt).data_ptr()),
        *(n, weight.group_size or 0, out.data_ptr()),
    )
    return out.to(x.dtype)


def by_blocks(path: str, x: Tensor, weight: Weight) -> Tensor:
    """`mm` by F.linear with blocks of rows, decoded into cache. Any groups."""
    (m, k), n = x.shape, weight.scale.shape[1]
    out = x.new_empty(m, n)
    step = max(1, _BLOCK // k // 4) * 4
    for row in range(0, n, step):
        rows = slice(row, min(row + step, n))
        out[:, rows] = F.linear(x, dequantize(path, weight, rows, k, x.dtype))
    return out


def dequantize(path: str, weight: Weight, rows: slice, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of the weight, from a multiple of 4 on, as [rows, k] in `dtype`: float32 products, rounded once."""
    n, bf16 = rows.stop - rows.start, dtype == torch.bfloat16
    out = torch.empty(n, k, dtype=dtype if bf16 else torch.float32)
    strip = rows.start // 4
    _function("fp6_dequantize")(
        *(PATHS.index(path), weight.w4[strip].data_ptr(), weight.w2[strip].data_ptr()),
        *(weight.scale[:, rows.start :].data_ptr(), weight.scale.shape[1], _values(weight.fmt).data_ptr()),
        *(n, k, weight.group_size or 0, out.data_ptr(), bf16),
    )
    return out.to(dtype)


@functools.cache
def _values(fmt: Format) -> Tensor:
    return fmt.values().contiguous()


_ARGUMENTS = {"fp6_mm": "ipiiqqppppqqp", "fp6_dequantize": "ipppqpqqqpi"}


@functools.cache
def _function(name: str) -> Any:
    types = {"i": ctypes.c_int, "p": ctypes.c_void_p, "q": ctypes.c_int64}
    function = getattr(library(), name)
    function.argtypes, function.restype = [types[t] for t in _ARGUMENTS[name]], None
    return function
