"""Integers and powers, to compare formats with. Nothing packs them: `calibrate_` leaves dequantized weights of them.

Integer: symmetric integers, as INT8 and INT4 in "FP8 versus INT8" (arXiv 2303.17951). FP8 needs no class: it is
Format("e4m3", 4, 3) or Format("e5m2", 5, 2), without NaN, as in "FP8 Quantization" (arXiv 2208.09225, section 2).

Power: integers of |w|^a, as NUPES (arXiv 2308.05600) and PowerQuant (arXiv 2301.09858) quantize. `nupes` searches a for each
layer by the output error; NUPES' training of it is not here.

Asymmetric: integers with a zero point for each group.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile.calibration.algorithms import RTN, Algorithm, Clip, Quantized, Search, Statistics
from fp6_compile.calibration.algorithms.base import per_weight
from fp6_compile.quantize import Grid


@dataclass(frozen=True)
class Integer:
    """From -(2^(bits-1) - 1) to 2^(bits-1) - 1. With `halves`, 2^bits odd multiples of a half, for Asymmetric."""

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
        """Codes of the nearest numbers, ties to even: the number plus 2^(bits-1)."""
        shift = 0.5 if self.halves else 0.0
        top = 2 ** (self.bits - 1)
        return (values - shift).round_().clamp_(-self.max - shift, top - 1).add_(top).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 numbers of codes."""
        return codes.to(torch.float32) - (2 ** (self.bits - 1) - (0.5 if self.halves else 0.0))

    def round(self, values: Tensor) -> Tensor:
        """decode(encode(values))."""
        shift = 0.5 if self.halves else 0.0
        return (values - shift).round_().add_(shift).clamp_(-self.max, self.max)


@dataclass(frozen=True)
class Power:
    """sign(i) |i / top|^(1/exponent) for integers |i| <= top = 2^(bits-1) - 1; rounded to the nearest i, as NUPES does."""

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
        """Codes: top plus the integer nearest to top |v|^exponent, with v's sign."""
        power = values.abs().clamp_(max=1.0).pow_(self.exponent).mul_(self._top).round_()
        return power.copysign_(values).add_(self._top).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 numbers of codes."""
        number = codes.to(torch.float32).sub_(self._top)
        return (number.abs() / self._top).pow_(1 / self.exponent).copysign_(number)

    def round(self, values: Tensor) -> Tensor:
        """decode(encode(values))."""
        return self.decode(self.encode(values))


def nupes(bits: int, base: Algorithm | None = None) -> Search:
    """The best Power grid for each weight, of exponents from 1 (integers) down to 0.3 in steps of 0.05."""
    exponents = tuple(Power(bits, round(1 - 0.05 * i, 2)) for i in range(15))
    return Search(base or Clip(), exponents)


@dataclass(frozen=True)
class WithOffset(Quantized):
    """Codes whose numbers are added to an offset of their group, [G, N]. No kernel does that."""

    offset: Tensor = field(kw_only=True)

    @property
    def packable(self) -> bool:
        """No: a PackedTensor has no offsets."""
        return False

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that codes, scales and offsets stand for."""
        weight = super().dequantize()
        return (weight + per_weight(self.offset, self.group_size, weight.shape[1])).to(dtype)

    @property
    def bytes(self) -> int:
        """Those of Quantized, and the offsets."""
        return super().bytes + self.offset.nbytes


@dataclass(frozen=True)
class Asymmetric(Algorithm):
    """`base` on each group of weights minus the middle of its range; Integer(bits, halves=True) then uses all 2^bits codes.

    It belongs outside of algorithms that choose codes: Asymmetric(GPTQ()), which have the same error with and without the
    offset.
    """

    base: Algorithm = field(default_factory=RTN)

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        size = group_size or weight.shape[1]
        # The last group is filled up with its own last weight, which changes neither end of its range.
        padded = F.pad(weight.float()[None], (0, -weight.shape[1] % size), mode="replicate")[0]
        low, high = padded.unflatten(1, (-1, size)).aminmax(dim=2)
        offset = ((low + high) / 2).T.contiguous()
        found = self.base(weight.float() - per_weight(offset, group_size, weight.shape[1]), grid, group_size, stats)
        return WithOffset(**{each.name: getattr(found, each.name) for each in fields(Quantized)}, offset=offset)
