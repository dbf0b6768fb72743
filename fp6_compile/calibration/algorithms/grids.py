"""Grids that formats are compared with. None has planes or a kernel: calibrate_ leaves dequantized weights of them.

Integer: symmetric integers, as INT8 and INT4 in "FP8 versus INT8" (arXiv 2303.17951). FP8 needs no class: it is
Format("e4m3", 4, 3) or Format("e5m2", 5, 2), without NaN, as in "FP8 Quantization" (arXiv 2208.09225, section 2).

Power: NUPES (arXiv 2308.05600) and PowerQuant (arXiv 2301.09858): integers of |w|^a. `search.nupes` finds the exponent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Integer:
    """From -(2^(bits-1) - 1) to 2^(bits-1) - 1; or, `halves`, 2^bits odd multiples of a half, what Asymmetric wants."""

    bits: int
    halves: bool = False

    @property
    def name(self) -> str:
        """Such as int4."""
        return f"int{self.bits}"

    @property
    def max(self) -> float:
        """The largest number."""
        return 2 ** (self.bits - 1) - (0.5 if self.halves else 1.0)

    def encode(self, values: Tensor) -> Tensor:
        """Nearest, ties to even; the code is the number and 2^(bits-1)."""
        shift = 0.5 if self.halves else 0.0
        top = 2 ** (self.bits - 1)
        return (values - shift).round_().clamp_(-self.max - shift, top - 1).add_(top).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32."""
        return codes.to(torch.float32) - (2 ** (self.bits - 1) - (0.5 if self.halves else 0.0))

    def round(self, values: Tensor) -> Tensor:
        """decode(encode(values))."""
        shift = 0.5 if self.halves else 0.0
        return (values - shift).round_().add_(shift).clamp_(-self.max, self.max)


@dataclass(frozen=True)
class Power:
    """sign(i) |i / top|^(1/exponent) for integers i up to top = 2^(bits-1) - 1; rounded as powers, as NUPES does."""

    bits: int
    exponent: float

    @property
    def name(self) -> str:
        """Such as power4^0.5."""
        return f"power{self.bits}^{self.exponent:g}"

    @property
    def max(self) -> float:
        """1."""
        return 1.0

    @property
    def _top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, values: Tensor) -> Tensor:
        """The integer nearest to top |v|^exponent, with v's sign; the code is that and top."""
        power = values.abs().clamp_(max=1.0).pow_(self.exponent).mul_(self._top).round_()
        return power.copysign_(values).add_(self._top).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32."""
        number = codes.to(torch.float32).sub_(self._top)
        return (number.abs() / self._top).pow_(1 / self.exponent).copysign_(number)

    def round(self, values: Tensor) -> Tensor:
        """decode(encode(values))."""
        return self.decode(self.encode(values))
