"""Round to nearest, absmax scale: the method of ZeroQuant(4+2) (arXiv 2312.08583, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp6_compile.calibration.algorithms.interface import Needs, Quantized
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid, quantize


@dataclass(frozen=True)
class RTN:
    """The largest magnitude of each group lands on the grid's largest number; every weight goes to the nearest code."""

    needs = Needs.NOTHING

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm."""
        return Quantized(grid, group_size, *quantize(weight, grid, group_size))
