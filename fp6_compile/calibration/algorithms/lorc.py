"""LoRC, low-rank compensation: ZeroQuant-V2 (arXiv 2303.08302, section 5), ZeroQuant-FP (arXiv 2307.09782).

The best approximation of rank r of the error E = W - Q, by its singular value decomposition E = U S V^T, stays beside the
codes in two 16-bit factors, the singular values' roots in each: A = V_r sqrt(S_r) [K, r] and B = sqrt(S_r) U_r^T [r, N].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.interface import Algorithm, Needs, Quantized
from fp6_compile.calibration.algorithms.rtn import RTN
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid


@dataclass(frozen=True)
class LoRC:
    """`base` and factors of its error, in the weight's dtype.

    Args:
        base: gives the codes.
        rank: r; at most min(N, K) is used.
        weighted: the error of input k counts sqrt(E[x_k^2]) times (as in LQER, arXiv 2402.02446, section 3.3).
    """

    base: Algorithm = field(default_factory=RTN)
    rank: int = 8
    weighted: bool = False

    @property
    def needs(self) -> Needs:
        """Those of base; moments if weighted."""
        return max(self.base.needs, Needs.MOMENTS if self.weighted else Needs.NOTHING)

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm."""
        found = self.base(weight, grid, group_size, stats)
        error = (weight.float() - found.dequantize()).double()
        if not self.weighted or stats is None:
            a, b = low_rank(error, self.rank)
        else:
            # Dead inputs get a little, so that nothing is divided by zero.
            count = (stats.second_moment + 1e-6 * stats.second_moment.mean().clamp(min=1e-30)).sqrt()
            a, b = low_rank(error * count, self.rank)
            a = a / count[:, None]
        return replace(found, low_rank=(a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()))


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [K, r] and B [r, N] with (A B)^T nearest to `error` [N, K], float64.

    From the eigenvectors of the smaller of E E^T and E^T E: ten times as fast as torch.linalg.svd on wide matrices, and
    in float64 exact beyond what 16 bits hold.
    """
    wide = error.shape[0] <= error.shape[1]
    e = error if wide else error.T
    squares, vectors = torch.linalg.eigh(e @ e.T)
    left = vectors[:, -min(rank, len(squares)) :].flip(1)
    right = left.T @ e  # S V^T
    root = right.norm(dim=1).sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp(min=1e-300), 0)
    left, right = left * root, right * inverse[:, None]
    return (right.T, left.T) if wide else (left, right)
