"""The eager launcher of the kernel: the tile is chosen by M on every call, so that no shape is ever the wrong one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp6_compile.formats import Format
from fp6_compile.kernels.selection.choices import choices
from fp6_compile.kernels.triton.dequantize import dequantize
from fp6_compile.kernels.triton.run import run
from fp6_compile.layouts.gpu_tiles import ROWS

# Floats of the weight that exist at a time on the way through ATen's matmul: 128 MiB of float16.
_SCRATCH = 1 << 26


def mm(x: Tensor, planes: Sequence[Tensor], scale: Tensor, fmt: Format, group_size: int | None) -> Tensor:
    """x @ weight.T.

    Args:
        x: [M, K], float16, bfloat16 or float32, any strides; on a GPU, or on the CPU when Triton's interpreter is on.
        planes: the weight [N, K] in the GPU tile layout that `packing.layout_for` gives for a GPU and x's dtype.
        scale: [G, N] float32; G is 1 when group_size is None.
        fmt: the format of the codes.
        group_size: inputs per scale; `config.supports(group_size)` must be None.

    Returns:
        [M, N], contiguous, of x's dtype: products summed in float32, scaled, rounded once.
    """
    (m, k), n = x.shape, scale.shape[1]
    if m == 0 or n == 0:
        return torch.empty(m, n, dtype=x.dtype, device=x.device)
    config = choices(x.device, m, n, k, group_size, x.dtype, fmt)[0]
    if config is None:
        return aten_mm(x, planes, scale, fmt, group_size)
    if x.stride(1) != 1:
        x = x.contiguous()
    return run(config, x, planes, scale, fmt, group_size)


def aten_mm(x: Tensor, planes: Sequence[Tensor], scale: Tensor, fmt: Format, group_size: int | None) -> Tensor:
    """The same by way of ATen's matmul, some rows of the weight at a time as floats. x is not float32.

    Rounds as a float weight would: each weight once to x's dtype, the sum once.
    """
    (m, k), n = x.shape, scale.shape[1]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tiles = max(1, _SCRATCH // (k * ROWS))
    for first in range(0, planes[0].shape[0], tiles):
        rows, some = slice(first * ROWS, (first + tiles) * ROWS), slice(first, first + tiles)
        weight = dequantize([plane[some] for plane in planes], scale[:, rows], fmt, group_size, k, x.dtype)
        torch.mm(x, weight.T, out=out[:, rows])
    return out
