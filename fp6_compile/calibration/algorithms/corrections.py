"""Corrections beside the codes: low-rank factors of the error, and its mean in the bias. The codes stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.base import Needs, Quantized, Refinement
from fp6_compile.calibration.algorithms.statistics import Statistics


@dataclass(frozen=True)
class LoRC(Refinement):
    """Low-rank compensation: ZeroQuant-V2 (arXiv 2303.08302, section 5), ZeroQuant-FP (arXiv 2307.09782).

    The best approximation of rank r of the error E = W - Q, from its singular value decomposition E = U S V^T, is kept in
    two factors of the weight's dtype, each with the roots of the singular values: A = V_r sqrt(S_r) [K, r] and
    B = sqrt(S_r) U_r^T [r, N].

    Args:
        base: chooses the codes.
        rank: r; at most min(N, K) is used.
        weighted: the error of input k counts sqrt(E[x_k^2]) times (as in LQER, arXiv 2402.02446, section 3.3).
    """

    rank: int = 8
    weighted: bool = False

    @property
    def needs(self) -> Needs:
        """Those of `base`; moments if weighted."""
        return max(self.base.needs, Needs.MOMENTS if self.weighted else Needs.NOTHING)

    def refine(self, weight: Tensor, start: Quantized, stats: Statistics | None) -> Quantized:
        """Add the factors of the error."""
        error = (weight.float() - start.dequantize()).double()
        if not self.weighted or stats is None:
            a, b = low_rank(error, self.rank)
        else:
            # An input that is always zero counts a little, so that nothing is divided by zero.
            count = (stats.second_moment + 1e-6 * stats.second_moment.mean().clamp(min=1e-30)).sqrt()
            a, b = low_rank(error * count, self.rank)
            a = a / count[:, None]
        return replace(start, low_rank=(a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()))


@dataclass(frozen=True)
class BiasCorrection(Refinement):
    """(W - Q) E[x] is added to the layer's bias: the mean output is then that of the 16-bit weight.

    A layer without a bias gets one. "Data-Free Quantization" (arXiv 1906.04721, section 4.2, here with data); one of the
    methods that arXiv 2311.12359 compares on minifloats. Without statistics it is `base`.
    """

    @property
    def needs(self) -> Needs:
        """At least the mean."""
        return max(self.base.needs, Needs.MOMENTS)

    def refine(self, weight: Tensor, start: Quantized, stats: Statistics | None) -> Quantized:
        """Add the shift of the bias."""
        if stats is None:
            return start
        return replace(start, shift=((weight.double() - start.effective().double()) @ stats.mean).float())


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [K, r] and B [r, N] with (A B)^T nearest to `error` [N, K], float64.

    From the eigenvectors of the smaller of E E^T and E^T E: ten times as fast as torch.linalg.svd on wide matrices, and
    with float64 more exact than 16 bits can hold.
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
