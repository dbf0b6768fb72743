"""Codes <-> bit planes: in the canonical layout, which is stored, and in the layouts that the kernels of devices read.

Six bits do not divide a machine word, so a code is split into its low four bits and its high two (ZeroQuant(4+2); FP6-LLM,
section 5.2). Each part is a bit plane, a tensor of its own, `w4` and `w2`, and both can be loaded aligned. Other widths are
split in the same way, the low bits first: 4 + 1 for five bits, 4 + 2 + 1 for seven (`Format.planes`). A bit plane is named
after its width.

"planes.v1" (canonical; checkpoints; and the C++ kernel, for other widths than six), little end first along K, K padded with
code 0 so that all planes end with a byte (six bits: to a multiple of 4):

    w4 [N, K/2] uint8    byte i = low4(k = 2i)  | low4(2i+1)  << 4
    w2 [N, K/4] uint8    byte i = high2(k = 4i) | high2(4i+1) << 2 | high2(4i+2) << 4 | high2(4i+3) << 6

"gpu_tiles_fp16.v1" and "gpu_tiles_bf16.v1" are the GPU's: gpu_tiles.py.

"cpu.v1" (the C++ kernel, six bits), N padded to 4 and K to 64 with code 0. A tile is 4 rows by 64 inputs, in three vectors:

    w4 [N/4, K/64, 2, 64] uint8    A: row 0 in the low six bits of each byte; B: row 1     top two bits of A, B and C:
    w2 [N/4, K/64,    64] uint8    C: row 2                                                row 3, from its low bits on

so that the bytes of the first three rows, as they are, index a table look-up that ignores high bits. Byte 16 l + i of a
vector belongs to input 8 l + i, byte 16 l + 8 + i to input 32 + 8 l + i (i < 8), the order that interleaving in 128-bit
lanes undoes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile.formats import Format
from fp6_compile.layouts import gpu_tiles
from fp6_compile.layouts.gpu_tiles import BLOCK_K, GPU_LAYOUTS, ROWS
from fp6_compile.quantize import check_finite, quantize, row_blocks

PLANES = "planes.v1"
CPU = "cpu.v1"
LAYOUTS = (PLANES, *GPU_LAYOUTS.values(), CPU)
TILE_ROWS, TILE_K = 4, 64


def layout_for(device: torch.device, dtype: torch.dtype, fmt: Format) -> str:
    """The layout that `fp6::mm` reads fastest on `device` with activations of `dtype`."""
    if device.type == "cpu":
        return CPU if fmt.bits == 6 else PLANES
    return gpu_layout(dtype)


def gpu_layout(dtype: torch.dtype) -> str:
    """The layout of a GPU, for activations of `dtype`; float32 goes through FP16 words."""
    return GPU_LAYOUTS.get(dtype, GPU_LAYOUTS[torch.float16])


def pack(codes: Tensor, fmt: Format, layout: str) -> tuple[Tensor, ...]:
    """The bit planes, low bits first, of codes [N, K] (uint8) in `layout`: see this module's docstring."""
    if layout == PLANES:
        return _pack_planes(codes, fmt)
    if layout == CPU and fmt.bits == 6:
        return _pack_tiles(codes)
    return gpu_tiles.pack(codes, fmt, lane_dtype(layout))


def unpack(planes: Sequence[Tensor], fmt: Format, layout: str, n: int, k: int) -> Tensor:
    """The codes [n, k] (uint8) that `pack` was given: its exact inverse."""
    if layout == PLANES:
        codes = _unpack_planes(planes, fmt)
    elif layout == CPU and fmt.bits == 6:
        codes = _unpack_tiles(*planes)
    else:
        codes = gpu_tiles.unpack(planes, fmt, lane_dtype(layout))
    return codes[:n, :k]


def pack_rows(
    codes: Callable[[slice], Tensor],
    n: int,
    k: int,
    device: torch.device,
    fmt: Format,
    layout: str,
    granularity: int = 1,
) -> list[Tensor]:
    """The bit planes of a weight [n, k] whose `codes` are made for some rows at a time, multiples of `granularity`."""
    planes: list[Tensor] = []
    per_index = rows_per_index(layout)
    for rows in row_blocks(n, k, device, max(granularity, per_index)):
        part = pack(codes(rows), fmt, layout)
        planes = planes or [plane.new_empty(-(-n // per_index), *plane.shape[1:]) for plane in part]
        for plane, filled in zip(planes, part, strict=True):
            plane[rows.start // per_index : -(-rows.stop // per_index)] = filled
    return planes


def pack_quantized(
    weight: Tensor, fmt: Format, layout: str, group_size: int | None, scale: str
) -> tuple[list[Tensor], Tensor]:
    """Bit planes and scales of `weight`, made some rows at a time. Raises ValueError as quantize.quantize does."""
    scales: list[Tensor] = []

    def codes(rows: slice) -> Tensor:
        try:
            codes, s = quantize(weight[rows], fmt, group_size, scale)
        except ValueError:
            check_finite(weight)  # the same error, with the count of the whole weight
            raise
        scales.append(s)
        return codes

    n, k = weight.shape
    planes = pack_rows(codes, n, k, weight.device, fmt, layout)
    return planes, torch.cat(scales, 1)


def repack(planes: Sequence[Tensor], fmt: Format, source: str, target: str, n: int, k: int) -> list[Tensor]:
    """The bit planes of a weight [n, k] in layout `source`, in layout `target`."""
    per_index = rows_per_index(source)

    def codes(rows: slice) -> Tensor:
        block = [plane[rows.start // per_index : -(-rows.stop // per_index)] for plane in planes]
        return unpack(block, fmt, source, rows.stop - rows.start, k)

    return pack_rows(codes, n, k, planes[0].device, fmt, target, per_index)


def plane_names(fmt: Format) -> tuple[str, ...]:
    """What the bit planes of `fmt` are called, in the order of `pack`: w4 and w2 for six bits."""
    return tuple(f"w{width}" for width in fmt.planes)


def canonical_shapes(fmt: Format, n: int, k: int) -> tuple[tuple[int, int], ...]:
    """Shapes of the canonical bit planes of a weight [n, k], in the order of `pack`."""
    granularity = _plane_granularity(fmt)
    padded = -(-k // granularity) * granularity
    return tuple((n, padded * width // 8) for width in fmt.planes)


def rows_per_index(layout: str) -> int:
    """How many weight rows one index of the leading dimension of the bit planes holds."""
    return {PLANES: 1, CPU: TILE_ROWS}.get(layout, ROWS)


class Held(NamedTuple):
    """Inputs that bit planes hold, padding included, and what their number was padded to a multiple of."""

    inputs: int
    granularity: int


def inputs_held(planes: Sequence[Tensor], fmt: Format, layout: str) -> Held:
    """How many inputs bit planes of `layout` hold."""
    if layout == PLANES:
        return Held(8 // fmt.planes[0] * planes[0].shape[1], _plane_granularity(fmt))
    if layout == CPU:
        return Held(TILE_K * planes[0].shape[1], TILE_K)
    lane_dtype(layout)
    return Held(BLOCK_K * planes[0].shape[1], BLOCK_K)


def lane_dtype(layout: str) -> torch.dtype:
    for dtype, name in GPU_LAYOUTS.items():
        if name == layout:
            return dtype
    if layout == CPU:
        raise ValueError(f"layout: {CPU!r} holds six bits only")
    raise ValueError(f"layout: got {layout!r}, known layouts are {list(LAYOUTS)}")


def _pack_planes(codes: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    codes = F.pad(codes, (0, -codes.shape[1] % _plane_granularity(fmt)))
    planes = []
    for width in fmt.planes:
        low, codes = codes & (1 << width) - 1, codes >> width
        parts = [low[:, i :: 8 // width] << i * width for i in range(8 // width)]
        planes.append(functools.reduce(torch.bitwise_or, parts))
    return tuple(planes)


def _unpack_planes(planes: Sequence[Tensor], fmt: Format) -> Tensor:
    codes, done = None, 0
    for plane, width in zip(planes, fmt.planes, strict=True):
        parts = [plane >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
        low = torch.stack(parts, -1).flatten(1) << done
        codes, done = low if codes is None else codes | low, done + width
    assert codes is not None
    return codes


def _plane_granularity(fmt: Format) -> int:
    return 8 // min(fmt.planes)


def _pack_tiles(codes: Tensor) -> tuple[Tensor, Tensor]:
    n, k = codes.shape
    codes = F.pad(codes, (0, -k % TILE_K, 0, -n % TILE_ROWS))
    # [N/4, 4, K/64, half, lane, 8]: a vector's bytes take the halves in turn, lane by lane.
    tiles = codes.unflatten(1, (-1, 2, 4, 8)).unflatten(0, (-1, TILE_ROWS)).transpose(3, 4).flatten(3)
    a, b, c, last = tiles.unbind(1)
    a, b, c = a | last << 6, b | last >> 2 << 6, c | last >> 4 << 6
    return torch.stack([a, b], 2), c.contiguous()


def _unpack_tiles(w4: Tensor, w2: Tensor) -> Tensor:
    a, b = w4.unbind(2)
    last = a >> 6 | b >> 6 << 2 | w2 >> 6 << 4
    tiles = torch.stack([a & 63, b & 63, w2 & 63, last], 1)  # [N/4, 4, K/64, 64]
    codes: Tensor = tiles.unflatten(3, (4, 2, 8)).transpose(3, 4)  # [N/4, 4, K/64, half, lane, 8]
    return codes.flatten(2).flatten(0, 1)
