"""Weights out of words, in registers: one text per (format, float type), generated from the tables of gpu_tiles.py.

On NVIDIA the text is PTX (ptx.py). Left as ordinary Triton code the same steps become PRMT and LOP3 on single halves: 4.8
instructions a weight instead of 2. That code is still here, generated from the same tables, for AMD and Intel GPUs and for
Triton's interpreter.

FP16 weights come out bias-shifted, value x 2^-12 or 2^-14, and the accumulator is multiplied by Format.exponent_rescale
once, at the end. A BF16 one would be value x 2^-124 or 2^-126, whose products with x are float32 subnormals that tensor
cores may flush, so BF16 is rescaled here, by one multiply of two weights: exact, for a code has at most four significant
bits. `fma` with addend -0 rather than `mul`, because mul.bf16x2 needs sm_90 and x + -0 is x for both zeros.
"""

# mypy: allow-untyped-defs
# ruff: noqa: RET505
# The arguments of a @triton.jit function are Triton's, and it needs the `else` after a `return`.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp6_compile.formats import FORMATS, Format
from fp6_compile.kernels.triton.ptx import ptx
from fp6_compile.layouts.gpu_tiles import GPU_LAYOUTS, LANES, float_mask, terms, words


def _lanes(fmt: Format, dtype: torch.dtype) -> list[dict[str, int | float]]:
    """The constants of `_unpack_lane`."""
    table = LANES[fmt.name, dtype]
    shared: dict[str, int | float] = {"odd_shift": table.odd_shift, "odd_sign_shift": table.odd_sign_shift}
    shared |= {"float_mask": float_mask(fmt, dtype), "rescale": fmt.exponent_rescale(dtype)}
    return [vars(lane) | shared for lane in table.lanes]


def _terms(fmt: Format, dtype: torch.dtype) -> list[list[tuple[int, int, int]]]:
    return [[(part.word, part.shift, part.mask) for part in parts] for parts in terms(fmt, dtype)]


# By (EXPONENT_BITS, MANTISSA_BITS, BF16). tl.constexpr, so that Triton's cache key covers what the words mean.
_KEYS = {(f.exponent_bits, f.mantissa_bits, d == torch.bfloat16): (f, d) for f in FORMATS.values() for d in GPU_LAYOUTS}
_PTX = tl.constexpr({key: ptx(*of) for key, of in _KEYS.items()})
_LANES = tl.constexpr({key: _lanes(*of) for key, of in _KEYS.items() if (of[0].name, of[1]) in LANES})
_TERMS = tl.constexpr({key: _terms(*of) for key, of in _KEYS.items()})
_RESCALES = tl.constexpr({key: f.exponent_rescale(d) for key, (f, d) in _KEYS.items()})
_WORDS = tl.constexpr({key[:2]: words(f) for key, (f, _) in _KEYS.items()})


@triton.constexpr_function
def _asm(exponent_bits, mantissa_bits, bf16):
    return _PTX.value[exponent_bits, mantissa_bits, bf16]


@triton.constexpr_function
def _constraints(exponent_bits, mantissa_bits):
    return ",".join(["=&r"] * 8 + ["r"] * sum(_WORDS.value[exponent_bits, mantissa_bits]))


@triton.constexpr_function
def _has_lanes(exponent_bits, mantissa_bits, bf16):
    return (exponent_bits, mantissa_bits, bf16) in _LANES.value


@triton.constexpr_function
def _lane(exponent_bits, mantissa_bits, bf16, i, name):
    return _LANES.value[exponent_bits, mantissa_bits, bf16][i][name]


@triton.constexpr_function
def _term_count(exponent_bits, mantissa_bits, bf16, chunk):
    return len(_TERMS.value[exponent_bits, mantissa_bits, bf16][chunk])


@triton.constexpr_function
def _term(exponent_bits, mantissa_bits, bf16, chunk, i, part):
    return _TERMS.value[exponent_bits, mantissa_bits, bf16][chunk][i][part]


@triton.constexpr_function
def exponent_rescale(exponent_bits, mantissa_bits, bf16):
    """What weights in float position are too small by."""
    return _RESCALES.value[exponent_bits, mantissa_bits, bf16]


@triton.constexpr_function
def plane_words(exponent_bits, mantissa_bits, plane):
    """How many words a block has in plane number `plane`, 0 if there is none."""
    return (*_WORDS.value[exponent_bits, mantissa_bits], 0, 0)[plane]


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
def _as_float(bits, RESCALE: tl.constexpr, BF16: tl.constexpr):
    if BF16:
        return ((bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True) * RESCALE).to(tl.bfloat16)
    else:
        return bits.to(tl.float16, bitcast=True)


@triton.jit
def _unpack_lane(
    a, b, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BF16: tl.constexpr, LANE: tl.constexpr
):
    """The two weights of lane LANE out of int16 words."""
    A_SHIFT: tl.constexpr = _lane(EXPONENT_BITS, MANTISSA_BITS, BF16, LANE, "a_shift")
    B_SHIFT: tl.constexpr = _lane(EXPONENT_BITS, MANTISSA_BITS, BF16, LANE, "b_shift")
    ODD: tl.constexpr = _lane(EXPONENT_BITS, MANTISSA_BITS, BF16, LANE, "odd_shift")
    ODD_SIGN: tl.constexpr = _lane(EXPONENT_BITS, MANTISSA_BITS, BF16, LANE, "odd_sign_shift")
    RESCALE: tl.constexpr = exponent_rescale(EXPONENT_BITS, MANTISSA_BITS, BF16)
    a = a.to(tl.uint16, bitcast=True)
    b = b.to(tl.uint16, bitcast=True)
    mask = tl.full([1], _lane(EXPONENT_BITS, MANTISSA_BITS, BF16, LANE, "float_mask"), tl.uint16)
    p = _select(_right(a, A_SHIFT), _right(b, B_SHIFT), _lane(EXPONENT_BITS, MANTISSA_BITS, BF16, LANE, "mask"))
    odd = _right(p, ODD)
    if ODD_SIGN != ODD:
        odd = _select(odd, _right(p, ODD_SIGN), 0x7FFF)
    return _as_float(p & mask, RESCALE, BF16), _as_float(odd & mask, RESCALE, BF16)


@triton.jit
def _unpack_chunk(
    words, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BF16: tl.constexpr, CHUNK: tl.constexpr
):
    """The weight of chunk CHUNK, term by term."""
    bits = tl.zeros(words[0].shape, tl.uint16)
    for i in tl.static_range(_term_count(EXPONENT_BITS, MANTISSA_BITS, BF16, CHUNK)):
        word = words[_term(EXPONENT_BITS, MANTISSA_BITS, BF16, CHUNK, i, 0)].to(tl.uint16, bitcast=True)
        mask = tl.full([1], _term(EXPONENT_BITS, MANTISSA_BITS, BF16, CHUNK, i, 2), tl.uint16)
        bits |= _right(word, _term(EXPONENT_BITS, MANTISSA_BITS, BF16, CHUNK, i, 1)) & mask
    return _as_float(bits, exponent_rescale(EXPONENT_BITS, MANTISSA_BITS, BF16), BF16)


@triton.jit
def unpack(words, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BF16: tl.constexpr, USE_ASM: tl.constexpr):
    """Eight tiles, chunks 0 to 7, of float16 or bfloat16, of the shape of each of `words`, int16."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            _asm(EXPONENT_BITS, MANTISSA_BITS, BF16),
            _constraints(EXPONENT_BITS, MANTISSA_BITS),
            words,
            dtype=(tl.bfloat16 if BF16 else tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    elif _has_lanes(EXPONENT_BITS, MANTISSA_BITS, BF16):
        w0, w1 = _unpack_lane(words[0], words[2], EXPONENT_BITS, MANTISSA_BITS, BF16, 0)
        w2, w3 = _unpack_lane(words[0], words[2], EXPONENT_BITS, MANTISSA_BITS, BF16, 1)
        w4, w5 = _unpack_lane(words[1], words[2], EXPONENT_BITS, MANTISSA_BITS, BF16, 2)
        w6, w7 = _unpack_lane(words[1], words[2], EXPONENT_BITS, MANTISSA_BITS, BF16, 3)
        return w0, w1, w2, w3, w4, w5, w6, w7
    else:
        return (
            _unpack_chunk(words, EXPONENT_BITS, MANTISSA_BITS, BF16, 0),
            _unpack_chunk(words, EXPONENT_BITS, MANTISSA_BITS, BF16, 1),
            _unpack_chunk(words, EXPONENT_BITS, MANTISSA_BITS, BF16, 2),
            _unpack_chunk(words, EXPONENT_BITS, MANTISSA_BITS, BF16, 3),
            _unpack_chunk(words, EXPONENT_BITS, MANTISSA_BITS, BF16, 4),
            _unpack_chunk(words, EXPONENT_BITS, MANTISSA_BITS, BF16, 5),
            _unpack_chunk(words, EXPONENT_BITS, MANTISSA_BITS, BF16, 6),
            _unpack_chunk(words, EXPONENT_BITS, MANTISSA_BITS, BF16, 7),
        )
