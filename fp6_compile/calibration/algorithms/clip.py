"""Search of the scale by squared error, without data or with the inputs' second moments.

Clip: data-free. The scale of each group is the multiple of absmax with the least squared error (the clipping search of
OMSE, arXiv 1902.06822, section 3, per group). A float format gains from larger scales as well as from smaller ones.

Weighted: the error of the weights of input k counts E[x_k^2] times, which is the output's expected squared error if inputs
are uncorrelated. AWQ (arXiv 2306.00978, section 3.1) finds the salient weights that way, by the activations; here they steer
the scale, and nothing is equalized.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp6_compile.calibration.algorithms.interface import Needs, Quantized
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid, quantize


@dataclass(frozen=True)
class Clip:
    """Of `steps` + 1 scales from `low` to `high` times absmax, evenly spaced in their logarithm, and absmax itself."""

    steps: int = 48
    low: float = 0.55
    high: float = 1.6
    needs = Needs.NOTHING

    def ratios(self) -> tuple[float, ...]:
        """The multiples of absmax; 1 comes first, so that it wins where others are only as good."""
        return (1.0, *(self.low * (self.high / self.low) ** (i / self.steps) for i in range(self.steps + 1)))

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm."""
        return Quantized(grid, group_size, *quantize(weight, grid, group_size, "mse", None, self.ratios()))


@dataclass(frozen=True)
class Weighted(Clip):
    """As Clip, the error weighted by E[x_k^2]; a dead input's weights do not count. Without statistics: Clip.

    `hessian`: weighted by E[x x^T] instead, as far as inputs share a group: for one group, the output's error itself.
    """

    hessian: bool = False

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Moments, or the Hessian."""
        return Needs.HESSIAN if self.hessian else Needs.MOMENTS

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm."""
        importance = None if stats is None else stats.hessian() if self.hessian else stats.second_moment
        return Quantized(grid, group_size, *quantize(weight, grid, group_size, "mse", importance, self.ratios()))
