"""How the scale of each group is chosen: by the squared error that it leaves, or as a power of two.

Clip tries multiples of the absmax scale and keeps the one with the least squared error: the clipping search of OMSE
(arXiv 1902.06822, section 3), for each group. It needs no data. A floating-point format gains from larger scales as well as
from smaller ones.

Weighted counts the error of the weights of input k E[x_k^2] times: if inputs are uncorrelated, that is the expected squared
error of the output. AWQ (arXiv 2306.00978, section 3.1) finds salient weights by the activations in the same way; here they
choose the scale, and no weight is multiplied by anything.

PowerOfTwo restricts scales to powers of two: ZeroQuant-FP (arXiv 2307.09782, section 4, "casting the FP4 to FP8").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.base import Algorithm, Needs, Quantized, Refinement, per_weight
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid, quantize


@dataclass(frozen=True)
class Clip(Algorithm):
    """The best of absmax's scale and `steps` + 1 multiples of it from `low` to `high`, evenly spaced in their logarithm."""

    steps: int = 48
    low: float = 0.55
    high: float = 1.6

    def ratios(self) -> tuple[float, ...]:
        """The multiples of absmax's scale; 1 comes first, so that it wins where others are only as good."""
        return (1.0, *(self.low * (self.high / self.low) ** (i / self.steps) for i in range(self.steps + 1)))

    def importance(self, stats: Statistics | None) -> Tensor | None:
        """How much the squared error of each input's weights counts, as `quantize` takes it; None: all the same."""
        return None

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        found = quantize(weight, grid, group_size, "mse", self.importance(stats), self.ratios())
        return Quantized(grid, group_size, *found)


@dataclass(frozen=True)
class Weighted(Clip):
    """Clip with the error weighted by E[x_k^2]: weights of an input that is always zero do not count.

    Without statistics it is Clip.

    Args:
        hessian: weight pairs of inputs in a group by E[x x^T] instead. With one group that is the output's error itself.
    """

    hessian: bool = False

    @property
    def needs(self) -> Needs:
        """Moments, or the Hessian."""
        return Needs.HESSIAN if self.hessian else Needs.MOMENTS

    def importance(self, stats: Statistics | None) -> Tensor | None:
        """E[x_k^2], [K], or E[x x^T], [K, K]."""
        if stats is None:
            return None
        return stats.hessian() if self.hessian else stats.second_moment


@dataclass(frozen=True)
class PowerOfTwo(Refinement):
    """The scales of `base` rounded up to powers of two, and the codes that are nearest with them.

    That is M1 of the paper.

    Args:
        relative: M2 of the paper: the largest scale of a row stays, and the others become it divided by powers of two, none
            of them larger than it was.
    """

    relative: bool = False

    def refine(self, weight: Tensor, start: Quantized, stats: Statistics | None) -> Quantized:
        """The codes depend on the scales alone."""
        top = start.scale.amax(0, keepdim=True) if self.relative else None
        scale = _power_of_two(start.scale) if top is None else top / _power_of_two(top / start.scale)
        codes = start.grid.encode(weight.float() / per_weight(scale, start.group_size, weight.shape[1]))
        return replace(start, scale=scale, codes=codes)


def _power_of_two(scale: Tensor) -> Tensor:
    """The smallest powers of two that are not below `scale`; exact."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
