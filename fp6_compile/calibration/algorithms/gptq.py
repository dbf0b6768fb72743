"""GPTQ (arXiv 2210.17323, section 3): inputs are quantized one after the other, and later ones make up for the error.

With H = E[x x^T] and a triangular U of H^-1 = U^T U, the error e = (w_k - q_k) / U_kk of input k is subtracted from the
weights of the inputs j that are still to come, times U_kj: the change of them that lowers the output error most
(algorithm 1). Updates of later blocks of inputs wait until a block is done, and are then one matmul. As in the paper, 1 % of
the mean of H's diagonal is added to it. As in the paper's code, inputs with the largest E[x_k^2] come first, while many
others can still make up for their errors. Scales are fixed beforehand, so that they do not depend on that order.

GPTQ is greedy. A row whose output error on the calibration inputs it does not lower keeps the codes of `base`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.base import Needs, Quantized, Refinement, better_rows, row_blocks
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid

_BLOCK = 32  # inputs that are updated one by one; later ones are updated once a block


@dataclass(frozen=True)
class GPTQ(Refinement):
    """Codes by error feedback, on the scales of `base`; without statistics it is `base`.

    Args:
        base: chooses the scales.
        damping: share of the mean of H's diagonal that is added to the diagonal.
        order: whether inputs are taken by falling E[x_k^2], rather than from first to last, as in the paper.
    """

    damping: float = 0.01
    order: bool = True
    needs = Needs.HESSIAN

    def refine(self, weight: Tensor, start: Quantized, stats: Statistics | None) -> Quantized:
        """The codes do not depend on how inputs are numbered, if `order` is set."""
        if stats is None:
            return start
        columns = torch.arange(weight.shape[1], device=weight.device).flip(0)
        if self.order:
            columns = stats.second_moment.argsort(stable=True)
        groups = columns // start.group_size if start.group_size else torch.zeros_like(columns)
        factor = inverse_factor(stats, columns, self.damping)
        codes = torch.empty_like(start.codes)
        for rows in row_blocks(len(weight)):
            w = weight[rows].to(factor.dtype)[:, columns].T.contiguous()
            codes[rows, columns] = _feed_back(w, start.scale[groups][:, rows], factor, start.grid).T
        del factor
        return better_rows(weight, start, codes, stats)


def inverse_factor(stats: Statistics, columns: Tensor, damping: float) -> Tensor:
    """The lower triangular M of (H + d I)^-1 = M^T M, H in the order of `columns`; d is `damping` times H's mean diagonal.

    H = L L^T and M = L^-1: one decomposition, where the paper has two and an inverse, because inputs are quantized from the
    last to the first. M read backwards is the paper's upper triangular factor. All happens in one [K, K] matrix. If the
    decomposition fails, damping grows tenfold. An input that is always zero has d on the diagonal and zeros beside it: it
    is rounded to nearest, and makes up for no error.
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
    """Invert a lower triangular matrix in place: its two diagonal halves, then the block below the diagonal."""
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
    return grid.encode(w / scale)  # each row of w is as it was when it was rounded
