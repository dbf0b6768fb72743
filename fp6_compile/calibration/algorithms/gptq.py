"""GPTQ (arXiv 2210.17323, section 3): round one input's weights after the other, and let those still to come make up for it.

With H = E[x x^T] and a triangular U of H^-1 = U^T U, the error e = (w_k - q_k) / U_kk of input k is taken from the
weights of later inputs j, times U_kj: their best answer to it (algorithm 1). Updates of later blocks of inputs wait until a
block is done, and are then one matmul. From the paper are also the damping of H's diagonal (1 % of its mean) and, from its
code, the order: inputs with the largest E[x_k^2] first, while many can still answer. Scales are fixed beforehand, so
that groups and order do not get in each other's way.

GPTQ is greedy. A row whose output error on the calibration set it does not lower keeps the codes of `base`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.interface import Algorithm, Needs, Quantized, better_rows, row_blocks
from fp6_compile.calibration.algorithms.rtn import RTN
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid

_BLOCK = 32  # inputs that are updated one by one; what is beyond them, at once


@dataclass(frozen=True)
class GPTQ:
    """Codes by error feedback on the scales of `base`; without statistics, `base`.

    Args:
        base: finds the scales.
        damping: share of H's mean diagonal that is added to the diagonal.
        order: inputs by falling E[x_k^2], rather than as they stand (the paper).
    """

    base: Algorithm = field(default_factory=RTN)
    damping: float = 0.01
    order: bool = True
    needs = Needs.HESSIAN

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm. The codes do not depend on the order in which inputs stand, if `order` is set."""
        start = self.base(weight, grid, group_size, stats)
        if stats is None:
            return start
        columns = torch.arange(weight.shape[1], device=weight.device).flip(0)
        if self.order:
            columns = stats.second_moment.argsort(stable=True)
        factor = inverse_factor(stats, columns, self.damping)
        codes = torch.empty_like(start.codes)
        for rows in row_blocks(len(weight)):
            w = weight[rows].to(factor.dtype)[:, columns].T.contiguous()
            if start.offset is not None:
                w -= start.offset[_groups(columns, group_size)][:, rows]
            codes[rows, columns] = _feed_back(w, start.scale[_groups(columns, group_size)][:, rows], factor, grid).T
        del factor
        return better_rows(weight, start, replace(start, codes=codes), stats)


def inverse_factor(stats: Statistics, columns: Tensor, damping: float) -> Tensor:
    """The lower triangular M of (H + d I)^-1 = M^T M, H in the order of `columns`; d is `damping` times H's mean diagonal.

    H = L L^T and M = L^-1: one decomposition, where the paper has two and an inverse, because inputs are quantized from the
    last to the first: M read backwards is the paper's upper triangular factor. All happens in one [K, K] matrix. Damping
    grows tenfold until it succeeds. A dead input has d on the diagonal and nothing beside it: it is rounded to nearest and
    answers to nobody.
    """
    mean = float(stats.second_moment.mean())
    extra = damping * mean if mean > 0 else 1.0
    while True:
        matrix = stats.hessian(columns).mT  # symmetric; LAPACK works in place on columns
        matrix.diagonal().add_(extra)
        failed = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not failed:
            return _invert_(matrix)
        extra = max(10 * extra, 1e-6 * mean)


def _invert_(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, in its place: halves, and what lies between them."""
    half = len(lower) // 2
    if half < 128:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    first, last = _invert_(lower[:half, :half]), _invert_(lower[half:, half:])
    lower[half:, :half] = -(last @ (lower[half:, :half] @ first))
    return lower


def _feed_back(w: Tensor, scale: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Codes [K, N] of w [K, N], which is overwritten, from the last input to the first; scale [K, N]."""
    for end in range(len(w), 0, -_BLOCK):
        begin = max(end - _BLOCK, 0)
        errors = w.new_empty(end - begin, w.shape[1])
        for k in reversed(range(begin, end)):
            torch.sub(w[k], grid.round(w[k] / scale[k]).mul_(scale[k]), out=errors[k - begin]).div_(factor[k, k])
            w[begin:k].addr_(factor[k, begin:k], errors[k - begin], alpha=-1)
        w[:begin].addmm_(factor[begin:end, :begin].T, errors, alpha=-1)
    return grid.encode(w / scale)  # what each weight was when its turn came


def _groups(columns: Tensor, group_size: int | None) -> Tensor:
    return columns // group_size if group_size else torch.zeros_like(columns)
