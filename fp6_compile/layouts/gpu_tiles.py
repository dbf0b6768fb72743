"""The layouts that the GPU kernel reads: "gpu_tiles_fp16.v1" and "gpu_tiles_bf16.v1", one per compute dtype.

N is padded to 16 and K to 256 with code 0. A block is 16 rows by 256 inputs; its inputs are 8 chunks of 32, so that a chunk
is a contiguous stretch of x. A plane of width w gives a block w / 2 words of 16 bits for each (row, t), t in a chunk:

    w8 [N/16, K/256, 4, 16, 32] int16    word i: chunks 2i, 2i + 1
    w4 [N/16, K/256, 2, 16, 32] int16    word i: chunks 4i to 4i + 3
    w2 [N/16, K/256,    16, 32] int16    chunks 0-7
    w1 [N/16, K/256,    16, 32] uint8    chunks 0-7, a bit each

A weight comes out of its words in float position (sign at 15, the rest where Format.shift puts it) as a few `Term`s: bits
that one shift brings there, no bit crossing a 16-bit lane. `terms` has them for every chunk, and the packer below, the
kernel (kernels/triton/unpack.py) and the tests all read it.

For E3M2 and E2M3 a table says which bit of the three words A0, A1 (w4) and B (w2) is which, so that two weights share work:

    Q = bits(A >> a_shift, mask) | bits(B >> b_shift, ~mask)      one bit-select; Q holds two weights, in float position
    even chunk = Q & float_mask
    odd chunk  = (Q moved by odd_shift) & float_mask                E2M3's sign moves by odd_sign_shift

`LANES` was found by exhaustive search: every bit of the three words is used once, every weight has four bits in w4 and two
in w2, and left shifts are preferred (they run on the FMA pipe). For all other formats each plane's words hold its bits as
they are in the code, chunk 0 from bit 0 on: the sign is one term, and the rest one for each plane.

Words are int16, not uint16, because few torch ops take uint16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile.formats import Format

GPU_LAYOUTS = {torch.float16: "gpu_tiles_fp16.v1", torch.bfloat16: "gpu_tiles_bf16.v1"}
ROWS, CHUNK, CHUNKS_PER_BLOCK = 16, 32, 8
BLOCK_K = CHUNK * CHUNKS_PER_BLOCK


@dataclass(frozen=True)
class Lane:
    """How one Q, two weights, is cut out of word A{word} and word B. Positive shifts go right, negative ones left."""

    word: int
    mask: int
    a_shift: int
    b_shift: int


@dataclass(frozen=True)
class LaneTable:
    """The four lanes of a block's word triple, and where the odd chunk's weight sits in a lane (shifts as in `Lane`)."""

    odd_shift: int
    odd_sign_shift: int
    lanes: tuple[Lane, Lane, Lane, Lane]


@dataclass(frozen=True)
class Term:
    """Some bits of a weight, in float position: (words[word] >> shift) & mask; a negative shift goes left."""

    word: int
    shift: int
    mask: int


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


def words(fmt: Format) -> tuple[int, ...]:
    """How many words a block has in each plane of `fmt`."""
    return tuple(max(1, width // 2) for width in fmt.planes)


@functools.cache
def terms(fmt: Format, dtype: torch.dtype) -> tuple[tuple[Term, ...], ...]:
    """For each of the 8 chunks, the terms whose union is its weight in float position; words are counted across planes."""
    if (fmt.name, dtype) in LANES:
        return tuple(weight for lane in LANES[fmt.name, dtype].lanes for weight in _of_lane(lane, fmt, dtype))
    return tuple(_of_planes(chunk, fmt, dtype) for chunk in range(CHUNKS_PER_BLOCK))


def _of_lane(lane: Lane, fmt: Format, dtype: torch.dtype) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    table, mask = LANES[fmt.name, dtype], float_mask(fmt, dtype)
    parts = ((lane.word, lane.a_shift, lane.mask), (2, lane.b_shift, ~lane.mask & 0xFFFF))
    even = tuple(Term(word, shift, bits & mask) for word, shift, bits in parts)
    moves = ((table.odd_shift, mask & 0x7FFF), (table.odd_sign_shift, 0x8000))
    odd = [Term(word, s + move, _right(bits, move) & m) for move, m in moves for word, s, bits in parts]
    return even, _joined(odd)


def _of_planes(chunk: int, fmt: Format, dtype: torch.dtype) -> tuple[Term, ...]:
    found, first_word, done = [], 0, 0
    for width, count in zip(fmt.planes, words(fmt), strict=True):
        word, at = divmod(chunk * width, 16)
        for code_bit in range(done, done + width):
            to = 15 if code_bit == fmt.bits - 1 else code_bit + fmt.shift(dtype)
            found.append(Term(first_word + word, at + code_bit - done - to, 1 << to))
        first_word, done = first_word + count, done + width
    return _joined(found)


def _joined(parts: Sequence[Term]) -> tuple[Term, ...]:
    """Terms of the same word and shift as one."""
    masks: dict[tuple[int, int], int] = {}
    for term in parts:
        masks[term.word, term.shift] = masks.get((term.word, term.shift), 0) | term.mask
    return tuple(Term(*key, mask) for key, mask in masks.items() if mask)


def pack(codes: Tensor, fmt: Format, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The bit planes of codes [N, K] (uint8) in the GPU tile layout of `dtype`."""
    n, k = codes.shape
    codes = F.pad(codes, (0, -k % BLOCK_K, 0, -n % ROWS)).to(torch.int32)
    placed = (codes & fmt.sign) << (16 - fmt.bits) | (codes & (fmt.sign - 1)) << fmt.shift(dtype)
    chunks = placed.unflatten(0, (-1, ROWS)).unflatten(2, (-1, CHUNKS_PER_BLOCK, CHUNK)).permute(3, 0, 2, 1, 4)
    made = [torch.zeros_like(chunks[0]) for _ in range(sum(words(fmt)))]
    for weights, parts in zip(chunks, terms(fmt, dtype), strict=True):
        for term in parts:
            made[term.word] |= _right(weights & term.mask, -term.shift)
    planes, first = [], 0
    for width, count in zip(fmt.planes, words(fmt), strict=True):
        plane = made[first] if count == 1 else torch.stack(made[first : first + count], 2)
        planes.append(plane.to(torch.uint8 if width == 1 else torch.int16).contiguous())
        first += count
    return tuple(planes)


def unpack(planes: Sequence[Tensor], fmt: Format, dtype: torch.dtype) -> Tensor:
    """The codes that `pack` was given, with the padding."""
    by_word = [
        word.to(torch.int32) & 0xFFFF
        for plane, count in zip(planes, words(fmt), strict=True)
        for word in (plane.unbind(2) if count > 1 else [plane])
    ]
    placed = []
    for parts in terms(fmt, dtype):
        pieces = [_right(by_word[term.word], term.shift) & term.mask for term in parts]
        placed.append(functools.reduce(torch.bitwise_or, pieces))
    chunks = torch.stack(placed, 3).permute(0, 2, 1, 3, 4)  # [N/16, 16, K/256, 8, 32]
    wide = chunks.flatten(2).flatten(0, 1)
    return ((wide & 0x8000) >> (16 - fmt.bits) | wide >> fmt.shift(dtype) & (fmt.sign - 1)).to(torch.uint8)


def _right(bits: Any, shift: int) -> Any:
    """Tensors or integers, moved."""
    return bits >> shift if shift >= 0 else bits << -shift
