"""Codes <-> bytes: the canonical 4+2 planes that are stored, and the device layouts that the kernels read.

Six bits do not divide a machine word, so a code is split into its low four bits and its high two (ZeroQuant(4+2);
FP6-LLM, section 5.2), kept in two tensors, `w4` and `w2`, that both load aligned.

"planes.v1" (canonical; checkpoints), little end first along K, K padded to a multiple of 4 with code 0:

    w4 [N, K/2] uint8    byte i = low4(k = 2i)  | low4(2i+1)  << 4
    w2 [N, K/4] uint8    byte i = high2(k = 4i) | high2(4i+1) << 2 | high2(4i+2) << 4 | high2(4i+3) << 6

"slabs_fp16.v1", "slabs_bf16.v1" (GPU; one per compute dtype), N padded to 16 and K to 256 with code 0. A block is 16 rows
by 256 inputs; its inputs are 8 slabs of 32. Three 16-bit words hold the same (row, t) of all 8 slabs:

    w4 [N/16, K/256, 2, 16, 32] int16    A0: slabs 0-3, A1: slabs 4-7     four weights a word, four bits of each
    w2 [N/16, K/256,    16, 32] int16    B : slabs 0-7                    eight weights a word, two bits of each

so that a slab is a contiguous stretch of x, and eight weights come out of three words with no bit crossing a 16-bit lane:

    Q = bits(A >> a_shift, mask) | bits(B >> b_shift, ~mask)      one bit-select; Q holds two weights, in float position
    even slab = Q & float_mask                                     sign at 15, the rest where Format.shift puts it
    odd slab  = (Q moved by odd_shift) & float_mask                E2M3's sign moves by odd_sign_shift

Which bit of a word holds which bit of a code follows from `LANES`, found by exhaustive search: every bit of the three words
is used once, every weight has four bits in w4 and two in w2, and left shifts are preferred (they run on the FMA pipe). The
kernel, this packer and the tests read the same table. Words are int16, not uint16, because few torch ops take uint16.

"cpu.v1" (the C++ kernel), N padded to 4 and K to 64 with code 0. A tile is 4 rows by 64 inputs, in three vectors A, B, C:

    w4 [N/4, K/64, 2, 64] uint8    A: row 0 in the low six bits of each byte; B: row 1     top two bits of A, B and C:
    w2 [N/4, K/64,    64] uint8    C: row 2                                                row 3, from its low bits on

so that the first three rows, as they are, index a look-up that ignores high bits. Byte 16 l + i of a vector belongs to input
8 l + i, byte 16 l + 8 + i to input 32 + 8 l + i (i < 8), the order that interleaving in 128-bit lanes undoes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile.formats import Format

PLANES = "planes.v1"
SLABS = {torch.float16: "slabs_fp16.v1", torch.bfloat16: "slabs_bf16.v1"}
CPU = "cpu.v1"
LAYOUTS = (PLANES, *SLABS.values(), CPU)
TILE_ROWS, TILE_K = 4, 64
ROWS, SLAB, SLABS_PER_BLOCK = 16, 32, 8
BLOCK_K = SLAB * SLABS_PER_BLOCK


@dataclass(frozen=True)
class Lane:
    """How one Q, two weights, is cut out of word A{word} and word B. Positive shifts go right, negative ones left."""

    word: int
    mask: int
    a_shift: int
    b_shift: int


@dataclass(frozen=True)
class LaneTable:
    """The four lanes of a block's word triple, and where the odd slab's weight sits in a lane (shifts as in `Lane`)."""

    odd_shift: int
    odd_sign_shift: int
    lanes: tuple[Lane, Lane, Lane, Lane]


# E3M2's odd weight is its even one moved as a whole: one shift. In E2M3 no move of the whole leaves the two apart inside 16
# bits, so the sign moves by itself (two more instructions per two weights).
LANES = {
    ("e3m2", torch.float16): LaneTable(
        -8, -8, (Lane(0, 0x0F0F, 0, -3), Lane(0, 0x1E1E, 3, 0), Lane(1, 0x0F0F, 0, -2), Lane(1, 0x0F0F, 4, -1))
    ),
    ("e3m2", torch.bfloat16): LaneTable(
        -5, -5, (Lane(0, 0x07D9, 4, -1), Lane(0, 0x826F, 0, 2), Lane(1, 0x07D3, 4, 0), Lane(1, 0x82CF, 0, 3))
    ),
    ("e2m3", torch.float16): LaneTable(
        -5, -1, (Lane(0, 0x07F8, -3, -2), Lane(0, 0x07F8, 5, 0), Lane(1, 0xCAAC, -2, 0), Lane(1, 0xCD54, 0, -2))
    ),
    ("e2m3", torch.bfloat16): LaneTable(
        6, -12, (Lane(0, 0x5578, -3, -1), Lane(0, 0xF550, 0, -3), Lane(1, 0x5578, -3, 0), Lane(1, 0xF550, 0, -2))
    ),
}


def float_mask(fmt: Format, dtype: torch.dtype) -> int:
    """The 16-bit positions that a bias-shifted code of `fmt` occupies in `dtype`."""
    return 0x8000 | (fmt.sign - 1) << fmt.shift(dtype)


def layout_for(device: torch.device, dtype: torch.dtype) -> str:
    """The layout that `fp6::mm` reads fastest on `device` with activations of `dtype`; float32 goes through FP16 lanes."""
    return CPU if device.type == "cpu" else SLABS.get(dtype, SLABS[torch.float16])


def pack(codes: Tensor, fmt: Format, layout: str) -> tuple[Tensor, ...]:
    """The planes, (w4, w2) for six bits, of codes [N, K] (uint8) in `layout`: see this module's docstring."""
    if layout == PLANES:
        return _pack_planes(codes, fmt)
    if layout == CPU:
        return _pack_tiles(codes)
    return _pack_slabs(codes, fmt, _lane_dtype(layout))


def unpack(planes: Sequence[Tensor], fmt: Format, layout: str, n: int, k: int) -> Tensor:
    """The codes [n, k] (uint8) that `pack` was given: its exact inverse."""
    if layout == PLANES:
        codes = _unpack_planes(planes, fmt)
    elif layout == CPU:
        codes = _unpack_tiles(*planes)
    else:
        codes = _unpack_slabs(planes, fmt, _lane_dtype(layout))
    return codes[:n, :k]


def plane_names(fmt: Format) -> tuple[str, ...]:
    """What the planes of `fmt` are called, in the order of `pack`: w4 and w2 for six bits."""
    return tuple(f"w{width}" for width in fmt.planes)


def canonical_shapes(fmt: Format, n: int, k: int) -> tuple[tuple[int, int], ...]:
    """Shapes of the canonical planes of a weight [n, k], in the order of `pack`."""
    granularity = _plane_granularity(fmt)
    padded = -(-k // granularity) * granularity
    return tuple((n, padded * width // 8) for width in fmt.planes)


def rows_per_index(layout: str) -> int:
    """How many weight rows one index of the leading dimension of w4 and w2 holds."""
    return {PLANES: 1, CPU: TILE_ROWS}.get(layout, ROWS)


class Held(NamedTuple):
    """Inputs that planes hold, padding included, and what their number was padded to a multiple of."""

    inputs: int
    granularity: int


def inputs_held(w4: Tensor, layout: str) -> Held:
    """How many inputs a w4 of `layout` holds."""
    if layout == PLANES:
        return Held(2 * w4.shape[1], 4)
    if layout == CPU:
        return Held(TILE_K * w4.shape[1], TILE_K)
    _lane_dtype(layout)
    return Held(BLOCK_K * w4.shape[1], BLOCK_K)


def _lane_dtype(layout: str) -> torch.dtype:
    for dtype, name in SLABS.items():
        if name == layout:
            return dtype
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
    codes, taken = None, 0
    for plane, width in zip(planes, fmt.planes, strict=True):
        parts = [plane >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
        low = torch.stack(parts, -1).flatten(1) << taken
        codes, taken = low if codes is None else codes | low, taken + width
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
    return tiles.unflatten(3, (4, 2, 8)).transpose(3, 4).flatten(2).flatten(0, 1)


def _pack_slabs(codes: Tensor, fmt: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, k = codes.shape
    table, mask = LANES[fmt.name, dtype], float_mask(fmt, dtype)
    codes = F.pad(codes, (0, -k % BLOCK_K, 0, -n % ROWS)).to(torch.int32)
    placed = (codes & fmt.sign) << (16 - fmt.bits) | (codes & (fmt.sign - 1)) << fmt.shift(dtype)
    slabs = placed.unflatten(0, (-1, ROWS)).unflatten(2, (-1, SLABS_PER_BLOCK, SLAB)).permute(3, 0, 2, 1, 4)
    a = [torch.zeros_like(slabs[0]) for _ in range(2)]
    b = torch.zeros_like(slabs[0])
    for i, lane in enumerate(table.lanes):
        even, odd = slabs[2 * i], slabs[2 * i + 1]
        odd = _right(odd & mask & 0x7FFF, -table.odd_shift) | _right(odd & 0x8000, -table.odd_sign_shift)
        q = even | odd
        a[lane.word] |= _right(q & lane.mask, -lane.a_shift)
        b |= _right(q & ~lane.mask, -lane.b_shift)
    return torch.stack(a, 2).to(torch.int16), b.to(torch.int16).contiguous()


def _unpack_slabs(planes: Sequence[Tensor], fmt: Format, dtype: torch.dtype) -> Tensor:
    w4, w2 = planes
    table, mask = LANES[fmt.name, dtype], float_mask(fmt, dtype)
    a, b = w4.to(torch.int32) & 0xFFFF, w2.to(torch.int32) & 0xFFFF
    placed = []
    for lane in table.lanes:
        q = _right(a[:, :, lane.word], lane.a_shift) & lane.mask | _right(b, lane.b_shift) & ~lane.mask & 0xFFFF
        odd = _right(q, table.odd_shift) & mask & 0x7FFF | _right(q, table.odd_sign_shift) & 0x8000
        placed += [q & mask, odd]
    slabs = torch.stack(placed, 3).permute(0, 2, 1, 3, 4)  # [N/16, 16, K/256, 8, 32]
    wide = slabs.flatten(2).flatten(0, 1)
    return ((wide & 0x8000) >> (16 - fmt.bits) | wide >> fmt.shift(dtype) & (fmt.sign - 1)).to(torch.uint8)


def _right(words: Tensor, shift: int) -> Tensor:
    return words >> shift if shift >= 0 else words << -shift
