"""Bias correction: what quantization adds to a layer's mean output is taken from its bias.

"Data-Free Quantization" (arXiv 1906.04721, section 4.2, here with data); among the methods that "Post-Training Quantization
with Low-precision Minifloats and Integers on FPGAs" (arXiv 2311.12359) compares on minifloats.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from fp6_compile.calibration.algorithms.interface import Algorithm, Needs, Quantized
from fp6_compile.calibration.algorithms.rtn import RTN
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid


@dataclass(frozen=True)
class BiasCorrection:
    """`base`, and (W - Q) E[x] for the layer's bias, which it gets if it has none. Without statistics: base."""

    base: Algorithm = field(default_factory=RTN)

    @property
    def needs(self) -> Needs:
        """At least the mean."""
        return max(self.base.needs, Needs.MOMENTS)

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm."""
        found = self.base(weight, grid, group_size, stats)
        if stats is None:
            return found
        return replace(found, shift=((weight.double() - found.effective().double()) @ stats.mean).float())
