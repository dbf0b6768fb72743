"""Floating-point formats of three to eight bits, as data.

A format EeMm has one sign bit, e exponent bits and m mantissa bits, the IEEE bias 2^(e-1) - 1, gradual underflow, and
neither infinities nor NaN: every code is a finite number, and the all-ones exponent is an ordinary one (OCP MX, table 1).
So is E4M3's last code, NaN in OCP FP8: 480 is its largest value, all others are the same. With five exponent bits the
all-ones exponent stays IEEE's, as in OCP E5M2, because FP16 has no larger number: `encode` never gives it. Six exponent bits
do not fit FP16 at all, and without one a code is an integer.

*Bias shift* (FP6-LLM, arXiv 2401.14112, section 5.3; ZeroQuant(4+2), arXiv 2312.08583): put the code's sign into the sign
of a wider float and its exponent and mantissa, as one run of bits, across that float's exponent/mantissa boundary.

    E3M2   s e2 e1 e0 m1 m0
    FP16   s 0 0 e2 e1 e0 | m1 m0 0 0 0 0 0 0 0 0        = value x 2^(3 - 15) = value x 2^-12

The biased exponent is copied, so the result is the value times 2^(bias - wide bias), for normal numbers by definition and
for subnormal ones because both floats drop the implicit one at the same exponent code. Nothing is rounded; the power of
two that undoes the shift is `Format.exponent_rescale`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# (exponent bits, mantissa bits) of the dtypes a code can be shifted into.
_WIDE = {torch.float16: (5, 10), torch.bfloat16: (8, 7)}


@dataclass(frozen=True)
class Format:
    """A sign, `exponent_bits` and `mantissa_bits`; the highest bit of a code is the sign, bit 0 the last mantissa bit."""

    name: str
    exponent_bits: int
    mantissa_bits: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def sign(self) -> int:
        """The sign bit of a code, as a mask."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The code of the largest value."""
        return self.sign - 1 - (2**self.mantissa_bits if self.exponent_bits == 5 else 0)

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits that each stored plane has of a code, the low bits' plane first: 4 and 2 for six bits (ZeroQuant(4+2))."""
        return tuple(width for width in (8, 4, 2, 1) if self.bits & width)

    @property
    def max(self) -> float:
        """The largest value: 28 for E3M2, 7.5 for E2M3."""
        exponent = (self.max_code >> self.mantissa_bits) - self.bias
        return 2.0**exponent * (2 - 2.0**-self.mantissa_bits)

    def shift(self, dtype: torch.dtype) -> int:
        """Left shift that lays exponent and mantissa across the boundary of `dtype` (torch.float16 or torch.bfloat16)."""
        return _WIDE[dtype][1] - self.mantissa_bits

    def exponent_rescale(self, dtype: torch.dtype) -> float:
        """The power of two that turns a bias-shifted `dtype` back into the value: 2^(bias of dtype - bias)."""
        return 2.0 ** (2 ** (_WIDE[dtype][0] - 1) - 1 - self.bias)

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        """The values of all codes, in code order, exact in float32: by bias shift through FP16."""
        codes = torch.arange(2**self.bits, dtype=torch.int32, device=device)
        wide = (codes & self.sign) << (16 - self.bits) | (codes & (self.sign - 1)) << self.shift(torch.float16)
        return wide.to(torch.int16).view(torch.float16).to(torch.float32) * self.exponent_rescale(torch.float16)

    def decode(self, codes: Tensor) -> Tensor:
        """The exact values of `codes` (uint8, any shape), in float32."""
        # A gather from a few values takes a third of the time of shifting every code, on a CPU.
        return self.values(codes.device).index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)

    def encode(self, values: Tensor) -> Tensor:
        """The nearest codes (uint8, shape of `values`): ties to the even code, magnitudes above `max` saturate.

        Without a mantissa, ties of two powers of two go to the larger. `values` are finite float32.

        Exact: the sum of a magnitude and 1.5 x 2^(23 - m) times its own power of two has the format's spacing as its last
        place, so that the addition itself rounds to it, once, and leaves the number of steps in the sum's low bits. Integers
        and one addition: frexp and ldexp take fifteen times as long on a CPU.
        """
        m = self.mantissa_bits
        bits = values.to(torch.float32).view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        # Zero and the subnormals are spaced as the smallest normal binade; beyond twice `max` all is one.
        low, high = 128 - self.bias, 128 + math.frexp(self.max)[1]
        power = (magnitude & 0x7F800000).clamp_(low << 23, high << 23)
        magic = power + ((23 - m << 23) + (1 << 22))
        steps = magnitude.view(torch.float32).add_(magic.view(torch.float32)).view(torch.int32).sub_(magic)
        # A mantissa that rounds up to the next power of two carries into the exponent by itself.
        code = steps.add_((power >> (23 - m)) - (low << m)).clamp_(max=self.max_code)
        return code.bitwise_or_((bits >> (32 - self.bits)).bitwise_and_(self.sign)).to(torch.uint8)

    def round(self, values: Tensor) -> Tensor:
        """decode(encode(values)), in a third of the time: the same addition, and its subtraction."""
        low, high = 128 - self.bias, 128 + math.frexp(self.max)[1]
        magnitude = values.to(torch.float32).abs()
        power = (magnitude.view(torch.int32) & 0x7F800000).clamp_(low << 23, high << 23)
        magic = power.add_((23 - self.mantissa_bits << 23) + (1 << 22)).view(torch.float32)
        return magnitude.add_(magic).sub_(magic).clamp_(max=self.max).copysign_(values)


FORMATS = {
    f"e{e}m{bits - 1 - e}": Format(f"e{e}m{bits - 1 - e}", e, bits - 1 - e)
    for bits in range(3, 9)
    for e in range(1, min(5, bits - 1) + 1)
}


# The format where none is given: a quarter to half of E3M2's loss on trained models, at the same size (docs/decisions.md).
DEFAULT = "e2m3"
# What format="auto" chooses from: six bits each, and the kernels have tables for both.
AUTO = ("e3m2", "e2m3")


def get_format(name: str) -> Format:
    """The format called `name`. Raises ValueError, which lists the known names, for any other."""
    if name not in FORMATS:
        raise ValueError(f"format: got {name!r}, known formats are {sorted(FORMATS)}")
    return FORMATS[name]
