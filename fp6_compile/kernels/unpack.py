"""Six-bit weights out of words, in registers: one text per (format, float type), generated from `packing.LANES`.

Three 16-bit words hold the weights of one row at eight slabs (packing.py). On NVIDIA the unpack is PTX that works on two
neighbouring words at a time, as the halves of a 32-bit register; nothing that is kept crosses from one half to the other,
so every operation is an ordinary 32-bit one:

    p    = lop3(A >> a, B >> b, mask)       bit-select (0xE4): two weights a half, in float position
    even = p & float_mask
    odd  = (p moved) & float_mask           E2M3's sign moves by itself: one more shift and LOP3

Left as ordinary Triton code the same steps become PRMT and LOP3 on single halves: 4.8 instructions a weight instead of 2.
That code is still here, generated from the same table, for AMD and Intel GPUs and for Triton's interpreter.

    instructions / 16 weights   E3M2 FP16 21   E3M2 BF16 29   E2M3 FP16 29   E2M3 BF16 37     (two `mov` for BF16 hoisted)

FP16 weights come out bias-shifted, value x 2^-12 or 2^-14 (Format.lift), and the accumulator is lifted once, at the end. A
BF16 one would be value x 2^-124 or 2^-126, whose products with x are float32 subnormals that tensor cores may flush, so
BF16 is lifted here, by one multiply of two weights: exact, for a code has at most four significant bits. `fma` with addend
-0 rather than `mul`, because mul.bf16x2 needs sm_90 and x + -0 is x for both zeros.
"""

# mypy: allow-untyped-defs
# ruff: noqa: RET505
# The arguments of a @triton.jit function are Triton's, and it needs the `else` after a `return`.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp6_compile.formats import FORMATS, Format
from fp6_compile.packing import LANES, LaneTable, float_mask

_WORDS = ("$8", "$9")  # A0, A1; B is $10


def ptx(fmt: Format, dtype: torch.dtype) -> str:
    """The inline assembly: $0..$7 are the eight weights of two rows of words, $8, $9 and $10 the words A0, A1 and B."""
    table, mask, bf16 = LANES[fmt.name, dtype], float_mask(fmt, dtype), dtype == torch.bfloat16
    lines = [".reg .b32 a, b, p, t, u;"]
    if bf16:
        lines += [f".reg .b32 k, z; mov.b32 k, {_twice(_bf16_bits(fmt.lift(dtype)))}; mov.b32 z, {_twice(0x8000)};"]
    for i, lane in enumerate(table.lanes):
        lines += [_shift("a", _WORDS[lane.word], lane.a_shift), _shift("b", "$10", lane.b_shift)]
        lines += [f"lop3.b32 p, a, b, {_twice(lane.mask)}, 0xE4;", f"and.b32 ${2 * i}, p, {_twice(mask)};"]
        lines += _odd(table, mask, 2 * i + 1)
        lines += [f"fma.rn.bf16x2 ${j}, ${j}, k, z;" for j in (2 * i, 2 * i + 1) if bf16]
    return "{\n" + "\n".join(lines) + "\n}"


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


def _lanes(fmt: Format, dtype: torch.dtype) -> list[dict[str, int | float]]:
    """The constants of `_unpack_lane`."""
    table = LANES[fmt.name, dtype]
    shared: dict[str, int | float] = {"odd_shift": table.odd_shift, "odd_sign_shift": table.odd_sign_shift}
    shared |= {"float_mask": float_mask(fmt, dtype), "lift": fmt.lift(dtype)}
    return [vars(lane) | shared for lane in table.lanes]


# By (EXPONENT_BITS, BF16). tl.constexpr, so that Triton's cache key covers what the words mean.
_PTX = tl.constexpr({(FORMATS[f].exponent_bits, d == torch.bfloat16): ptx(FORMATS[f], d) for f, d in LANES})
_LANES = tl.constexpr({(FORMATS[f].exponent_bits, d == torch.bfloat16): _lanes(FORMATS[f], d) for f, d in LANES})


@triton.constexpr_function
def _asm(exponent_bits, bf16):
    return _PTX.value[exponent_bits, bf16]


@triton.constexpr_function
def _lane(exponent_bits, bf16, i, name):
    return _LANES.value[exponent_bits, bf16][i][name]


@triton.jit
def _right(word, SHIFT: tl.constexpr):
    if SHIFT > 0:
        return word >> SHIFT
    elif SHIFT < 0:
        return word << -SHIFT
    else:
        return word


@triton.jit
def _select(a, b, MASK: tl.constexpr):
    """The bits of a where MASK has ones, those of b elsewhere."""
    return ((a ^ b) & tl.full([1], MASK, tl.uint16)) ^ b


@triton.jit
def _as_float(bits, LIFT: tl.constexpr, BF16: tl.constexpr):
    if BF16:
        return ((bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True) * LIFT).to(tl.bfloat16)
    else:
        return bits.to(tl.float16, bitcast=True)


@triton.jit
def _unpack_lane(a, b, EXPONENT_BITS: tl.constexpr, BF16: tl.constexpr, LANE: tl.constexpr):
    """The two weights of lane LANE out of int16 words."""
    A_SHIFT: tl.constexpr = _lane(EXPONENT_BITS, BF16, LANE, "a_shift")
    B_SHIFT: tl.constexpr = _lane(EXPONENT_BITS, BF16, LANE, "b_shift")
    ODD: tl.constexpr = _lane(EXPONENT_BITS, BF16, LANE, "odd_shift")
    ODD_SIGN: tl.constexpr = _lane(EXPONENT_BITS, BF16, LANE, "odd_sign_shift")
    LIFT: tl.constexpr = _lane(EXPONENT_BITS, BF16, LANE, "lift")
    a = a.to(tl.uint16, bitcast=True)
    b = b.to(tl.uint16, bitcast=True)
    mask = tl.full([1], _lane(EXPONENT_BITS, BF16, LANE, "float_mask"), tl.uint16)
    p = _select(_right(a, A_SHIFT), _right(b, B_SHIFT), _lane(EXPONENT_BITS, BF16, LANE, "mask"))
    odd = _right(p, ODD)
    if ODD_SIGN != ODD:
        odd = _select(odd, _right(p, ODD_SIGN), 0x7FFF)
    return _as_float(p & mask, LIFT, BF16), _as_float(odd & mask, LIFT, BF16)


@triton.jit
def unpack(a0, a1, b, EXPONENT_BITS: tl.constexpr, BF16: tl.constexpr, USE_ASM: tl.constexpr):
    """Eight tiles, slabs 0 to 7, of float16 or bfloat16 with the shape of a0, a1 and b (int16 words of the slab layout)."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            _asm(EXPONENT_BITS, BF16),
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [a0, a1, b],
            dtype=(tl.bfloat16 if BF16 else tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        w0, w1 = _unpack_lane(a0, b, EXPONENT_BITS, BF16, 0)
        w2, w3 = _unpack_lane(a0, b, EXPONENT_BITS, BF16, 1)
        w4, w5 = _unpack_lane(a1, b, EXPONENT_BITS, BF16, 2)
        w6, w7 = _unpack_lane(a1, b, EXPONENT_BITS, BF16, 3)
        return w0, w1, w2, w3, w4, w5, w6, w7
