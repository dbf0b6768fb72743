"""Search of the grid itself, per layer.

LLM-FP4 (arXiv 2310.16836, section 3.1): how many of a format's bits are exponent is chosen per layer, together with the
clipping range, by the squared error of the layer's output. Here the range is the scale that `base` finds, and the error is
the best known: with the Hessian, with second moments, or of the weights alone.

NUPES (arXiv 2308.05600): the exponent of a power function, likewise. Only its search is here, not its training.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fp6_compile.calibration.algorithms.clip import Clip
from fp6_compile.calibration.algorithms.grids import Power
from fp6_compile.calibration.algorithms.interface import Algorithm, Needs, Quantized, output_error
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.formats import FORMATS
from fp6_compile.quantize import Grid


@dataclass(frozen=True)
class Search:
    """The one of `candidates` on which `base` errs least; without candidates, of all formats with the given grid's bits."""

    base: Algorithm = field(default_factory=Clip)
    candidates: tuple[Grid, ...] = ()

    @property
    def needs(self) -> Needs:
        """Those of base."""
        return self.base.needs

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm; `grid` gives the bits, and is itself a candidate if there are no others."""
        others = [format for format in FORMATS.values() if format.bits == grid.bits and format != grid]
        found = [self.base(weight, g, group_size, stats) for g in self.candidates or (grid, *others)]
        return min(found, key=lambda q: float(output_error(weight, q.dequantize(), stats).sum()))


def nupes(bits: int, base: Algorithm | None = None) -> Search:
    """Power grids with exponents from 0.3 to 1 (integers), in steps of 0.05."""
    exponents = tuple(Power(bits, round(1 - 0.05 * i, 2)) for i in range(15))
    return Search(base or Clip(), exponents)
