"""Six-bit floating-point formats, as data.

A format EeMm has one sign bit, e exponent bits and m mantissa bits, the IEEE bias 2^(e-1) - 1, gradual underflow, and
neither infinities nor NaN: every code is a finite number, and the all-ones exponent is an ordinary one (OCP MX, table 1).

*Bias shift* (FP6-LLM, arXiv 2401.14112, section 5.3; ZeroQuant(4+2), arXiv 2312.08583): put the code's sign into the sign
of a wider float and its exponent and mantissa, as one run of bits, across that float's exponent/mantissa boundary.

    E3M2   s e2 e1 e0 m1 m0
    FP16   s 0 0 e2 e1 e0 | m1 m0 0 0 0 0 0 0 0 0        = value x 2^(3 - 15) = value x 2^-12

The biased exponent is copied, so the result is the value times 2^(bias - wide bias), for normal numbers by definition and
for subnormal ones because both floats drop the implicit one at the same exponent code. Nothing is rounded; the power of
two that undoes the shift is `Format.lift`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# (exponent bits, mantissa bits) of the dtypes a code can be shifted into.
_WIDE = {torch.float16: (5, 10), torch.bfloat16: (8, 7)}


@dataclass(frozen=True)
class Format:
    """A sign, `exponent_bits` and `mantissa_bits`; bit 5 of a code is the sign, bit 0 the last mantissa bit."""

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
        """The sign bit of a code, as a mask; `sign - 1` is the code of the largest value."""
        return 1 << (self.bits - 1)

    @property
    def max(self) -> float:
        """The largest value: 28 for E3M2, 7.5 for E2M3."""
        return float(2 ** (2**self.exponent_bits - 1 - self.bias) * (2 - 2.0**-self.mantissa_bits))

    def shift(self, dtype: torch.dtype) -> int:
        """Left shift that lays exponent and mantissa across the boundary of `dtype` (torch.float16 or torch.bfloat16)."""
        return _WIDE[dtype][1] - self.mantissa_bits

    def lift(self, dtype: torch.dtype) -> float:
        """The power of two that turns a bias-shifted `dtype` back into the value: 2^(bias of dtype - bias)."""
        return 2.0 ** (2 ** (_WIDE[dtype][0] - 1) - 1 - self.bias)

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        """The values of all codes, in code order, exact in float32: by bias shift through FP16."""
        codes = torch.arange(2**self.bits, dtype=torch.int32, device=device)
        wide = (codes & self.sign) << (16 - self.bits) | (codes & (self.sign - 1)) << self.shift(torch.float16)
        return wide.to(torch.int16).view(torch.float16).to(torch.float32) * self.lift(torch.float16)

    def decode(self, codes: Tensor) -> Tensor:
        """The exact values of `codes` (uint8, any shape), in float32."""
        # A gather from 64 values takes a third of the time of shifting every code, on a CPU.
        return self.values(codes.device).index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)

    def encode(self, values: Tensor) -> Tensor:
        """The nearest codes (uint8, shape of `values`): ties to the even code, magnitudes above `max` saturate.

        `values` are finite float32 or float64. Exact: one rounding, of the value divided by the spacing of the codes
        around it, which is a power of two.
        """
        magnitude = values.abs()
        # Zero and the subnormals are spaced as the smallest normal binade.
        exponent = torch.frexp(magnitude.clamp(min=2.0 ** (1 - self.bias))).exponent - 1
        steps = torch.ldexp(magnitude, self.mantissa_bits - exponent).round_().to(torch.int32)
        # A mantissa that rounds up to the next power of two carries into the exponent by itself.
        code = (steps + ((exponent + self.bias - 1) << self.mantissa_bits)).clamp_(max=self.sign - 1)
        return (code | torch.signbit(values) * self.sign).to(torch.uint8)


FORMATS = {f.name: f for f in (Format("e3m2", 3, 2), Format("e2m3", 2, 3))}


def get_format(name: str) -> Format:
    """The format called `name`. Raises ValueError, which lists the known names, for any other."""
    if name not in FORMATS:
        raise ValueError(f"format: got {name!r}, known formats are {sorted(FORMATS)}")
    return FORMATS[name]
