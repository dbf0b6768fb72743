"""Constraints on scales and offsets beside them.

PowerOfTwo: ZeroQuant-FP (arXiv 2307.09782, section 4, "casting the FP4 to FP8"), whose scales are then only shifts.

Asymmetric: each group's range is centred before `base` sees it, and the centre is stored: the integers with a zero point
that INT4 is used with. For evaluation: no kernel adds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile.calibration.algorithms.interface import Algorithm, Needs, Quantized, per_weight
from fp6_compile.calibration.algorithms.rtn import RTN
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid


@dataclass(frozen=True)
class PowerOfTwo:
    """The scales of `base`, constrained, and the codes nearest on them.

    By default each becomes the power of two that is not below it (M1 of the paper). `relative`: the largest of a row stays,
    and the others become it over the least power of two that does not leave them above what they were (M2).
    """

    base: Algorithm = field(default_factory=RTN)
    relative: bool = False

    @property
    def needs(self) -> Needs:
        """Those of base."""
        return self.base.needs

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm."""
        found = self.base(weight, grid, group_size, stats)
        top = found.scale.amax(0, keepdim=True) if self.relative else None
        scale = _up(found.scale) if top is None else top / _up(top / found.scale)
        return replace(found, scale=scale, codes=nearest(weight, replace(found, scale=scale)))


@dataclass(frozen=True)
class Asymmetric:
    """`base` on weights less the middle of their group; with Integer(bits, halves=True) all 2^bits codes are of use."""

    base: Algorithm = field(default_factory=RTN)

    @property
    def needs(self) -> Needs:
        """Those of base."""
        return self.base.needs

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm."""
        size = group_size or weight.shape[1]
        # The last group is filled up with its own last weight, which changes neither end of its range.
        padded = F.pad(weight.float()[None], (0, -weight.shape[1] % size), mode="replicate")[0]
        low, high = padded.unflatten(1, (-1, size)).aminmax(dim=2)
        offset = ((low + high) / 2).T.contiguous()
        centred = weight.float() - per_weight(offset, group_size, weight.shape[1])
        return replace(self.base(centred, grid, group_size, stats), offset=offset)


def nearest(weight: Tensor, found: Quantized) -> Tensor:
    """The codes nearest to `weight` on the scales and offsets that were found."""
    k = weight.shape[1]
    offset = 0 if found.offset is None else per_weight(found.offset, found.group_size, k)
    return found.grid.encode((weight.float() - offset) / per_weight(found.scale, found.group_size, k))


def _up(scale: Tensor) -> Tensor:
    """The least powers of two that are not below; exact."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
