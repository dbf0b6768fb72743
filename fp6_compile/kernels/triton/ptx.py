"""The unpack on NVIDIA: PTX that works on two neighbouring words at a time, as the halves of a 32-bit register.

Nothing that is kept crosses from one half to the other, so every operation is an ordinary 32-bit one. For E3M2 and E2M3, of
which three 16-bit words hold the weights of one row at eight chunks:

    p    = lop3(A >> a, B >> b, mask)       bit-select (0xE4): two weights a half, in float position
    even = p & float_mask
    odd  = (p moved) & float_mask           E2M3's sign moves by itself: one more shift and LOP3

    instructions / 16 weights   E3M2 FP16 21   E3M2 BF16 29   E2M3 FP16 29   E2M3 BF16 37     (two `mov` for BF16 hoisted)

The weights of all other formats are put together term by term (gpu_tiles.terms), a shift and a LOP3 for each: two for most
formats, three for those of seven bits.
"""

from __future__ import annotations

import torch

from fp6_compile.formats import Format
from fp6_compile.layouts.gpu_tiles import CHUNKS_PER_BLOCK, LANES, LaneTable, Term, float_mask, terms


def ptx(fmt: Format, dtype: torch.dtype) -> str:
    """The inline assembly: $0..$7 are the eight weights of two rows of words, $8, $9, ... the words."""
    mask, rescale = float_mask(fmt, dtype), []
    lines = [".reg .b32 a, b, p, t, u;"]
    if dtype == torch.bfloat16:
        factor = _twice(_bf16_bits(fmt.exponent_rescale(dtype)))
        lines += [f".reg .b32 k, z; mov.b32 k, {factor}; mov.b32 z, {_twice(0x8000)};"]
        rescale = [f"fma.rn.bf16x2 ${j}, ${j}, k, z;" for j in range(CHUNKS_PER_BLOCK)]
    if (fmt.name, dtype) not in LANES:
        for j, parts in enumerate(terms(fmt, dtype)):
            lines += [*_weight(parts, f"${j}"), *rescale[j : j + 1]]
        return _block(lines)
    table = LANES[fmt.name, dtype]
    for i, lane in enumerate(table.lanes):
        lines += [_shift("a", _word(lane.word), lane.a_shift), _shift("b", _word(2), lane.b_shift)]
        lines += [f"lop3.b32 p, a, b, {_twice(lane.mask)}, 0xE4;", f"and.b32 ${2 * i}, p, {_twice(mask)};"]
        lines += [*_odd(table, mask, 2 * i + 1), *rescale[2 * i : 2 * i + 2]]
    return _block(lines)


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def _word(number: int) -> str:
    return f"${CHUNKS_PER_BLOCK + number}"


def _weight(parts: tuple[Term, ...], to: str) -> list[str]:
    """`to` = the union of the terms."""
    lines = [_shift("p", _word(parts[0].word), parts[0].shift), f"and.b32 p, p, {_twice(parts[0].mask)};"]
    for part in parts[1:]:
        # 0xEC: (t & mask) | p
        lines += [_shift("t", _word(part.word), part.shift), f"lop3.b32 p, t, p, {_twice(part.mask)}, 0xEC;"]
    return [*lines, f"mov.b32 {to}, p;"]


def _odd(table: LaneTable, mask: int, to: int) -> list[str]:
    """$to = the odd weight of p."""
    moved = _shift("t", "p", table.odd_shift)
    if table.odd_sign_shift == table.odd_shift:
        return [moved, f"and.b32 ${to}, t, {_twice(mask)};"]
    sign = _shift("u", "p", table.odd_sign_shift)
    # 0xEC: (u & 0x8000) | t
    return [moved, f"and.b32 t, t, {_twice(mask & 0x7FFF)};", sign, f"lop3.b32 ${to}, u, t, {_twice(0x8000)}, 0xEC;"]


def _shift(to: str, source: str, shift: int) -> str:
    if shift == 0:
        return f"mov.b32 {to}, {source};"
    return f"{'shr' if shift > 0 else 'shl'}.b32 {to}, {source}, {abs(shift)};"


def _twice(bits: int) -> str:
    return f"0x{bits << 16 | bits:08X}"


def _bf16_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16))
