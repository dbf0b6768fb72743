"""Search: the best of several formats for each weight.

LLM-FP4 (arXiv 2310.16836, section 3.1) chooses for each layer how many of a format's bits are exponent, together with the
clipping range, by the squared error of the layer's output. Here `base` chooses the scale for each format.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fp6_compile.calibration.algorithms.base import Algorithm, Quantized, output_error
from fp6_compile.calibration.algorithms.scales import Clip
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.formats import FORMATS
from fp6_compile.quantize import Grid


@dataclass(frozen=True)
class Search(Algorithm):
    """The result of `base` for the candidate with the least output error.

    The error is `output_error`: with the Hessian where `base` needs it, with second moments, or of the weights alone.

    Args:
        base: the algorithm that is run once for each candidate.
        candidates: formats or other grids; empty: the format that it is called with, and all others of as many bits.
    """

    base: Algorithm = field(default_factory=Clip)
    candidates: tuple[Grid, ...] = ()

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        others = [format for format in FORMATS.values() if format.bits == grid.bits and format != grid]
        found = [self.base(weight, g, group_size, stats) for g in self.candidates or (grid, *others)]
        return min(found, key=lambda q: float(output_error(weight, q.dequantize(), stats).sum()))
