"""GPTQ (arXiv 2210.17323, section 3): round one input's weights after the other, and let those still to come make up for it.

With H = E[x x^T] and the upper triangular U of H^-1 = U^T U, the error e = (w_k - q_k) / U_kk of input k is taken from the
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

from fp6_compile.algorithms.interface import Algorithm, Needs, Quantized, better_rows, row_blocks
from fp6_compile.algorithms.rtn import RTN
from fp6_compile.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid

_BLOCK = 32  # inputs that are updated one by one; what is beyond them, at once


@dataclass(frozen=True)
class GPTQ:
    """Codes by error feedback on the scales of `base`; without statistics, `base`.

    Args:
        base: finds the scales.
        damping: share of H's mean diagonal that is added to the diagonal.
        order: inputs by falling E[x_k^2], rather than as they stand.
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
        hessian = stats.hessian
        columns = torch.arange(len(hessian), device=hessian.device)
        if self.order:
            columns = hessian.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(hessian[columns][:, columns], self.damping)
        codes = torch.empty_like(start.codes)
        for rows in row_blocks(len(weight)):
            w = weight[rows].to(factor.dtype)[:, columns].T.contiguous()
            if start.offset is not None:
                w -= start.offset[_groups(columns, group_size)][:, rows]
            codes[rows, columns] = _feed_back(w, start.scale[_groups(columns, group_size)][:, rows], factor, grid).T
        return better_rows(weight, start, replace(start, codes=codes), stats)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U of (H + d I)^-1 = U^T U, where d is `damping` times the mean diagonal of H.

    From one Cholesky decomposition instead of the paper's two and an inverse: the factor of H with both axes reversed is,
    reversed back, upper triangular R with H = R R^T, and U = R^-1. Damping grows tenfold until it succeeds. Dead inputs have
    d on the diagonal and nothing beside it: they are rounded to nearest and answer to nobody.
    """
    mean = float(hessian.diagonal().mean())
    extra = damping * mean if mean > 0 else 1.0
    while True:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(extra)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        extra = max(10 * extra, 1e-6 * mean)
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def _feed_back(w: Tensor, scale: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Codes [K, N] of w [K, N], which is overwritten; scale [K, N]."""
    codes = torch.empty_like(w, dtype=torch.uint8)
    for begin in range(0, len(w), _BLOCK):
        end = min(begin + _BLOCK, len(w))
        errors = w.new_empty(end - begin, w.shape[1])
        for k in range(begin, end):
            codes[k] = grid.encode(w[k] / scale[k])
            errors[k - begin] = (w[k] - grid.decode(codes[k]) * scale[k]) / factor[k, k]
            w[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - begin], alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return codes


def _groups(columns: Tensor, group_size: int | None) -> Tensor:
    return columns // group_size if group_size else torch.zeros_like(columns)
