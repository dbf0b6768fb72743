"""Statistics of a layer's inputs: sums over tokens, whose size does not grow with the number of batches."""

from __future__ import annotations

import torch
from torch import Tensor


class Statistics:
    """Count, mean, E[x^2], largest magnitude and, if asked for, the Hessian E[x x^T] of inputs [tokens, K].

    Tokens with NaN or infinite values are left out, and counted in `left_out`.

    Args:
        k: inputs of the layer.
        hessian: whether to keep the [K, K] matrix.
        dtype: of that matrix; float32, or float64 for twice the memory.
    """

    def __init__(
        self,
        k: int,
        hessian: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.count = self.left_out = 0
        self.absmax = torch.zeros(k, device=device)
        self._sum = torch.zeros(k, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sum)
        self._gram = torch.zeros(k, k, dtype=dtype, device=device) if hessian else None

    @classmethod
    def of(cls, x: Tensor, hessian: bool = False, dtype: torch.dtype = torch.float32) -> Statistics:
        """Statistics of one batch [..., K]."""
        stats = cls(x.shape[-1], hessian, x.device, dtype)
        stats.add(x)
        return stats

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the inputs [..., K] of more tokens."""
        x = x.detach().flatten(0, -2)
        finite = x.isfinite().all(1)
        kept = x[finite] if not finite.all() else x
        self.left_out += len(x) - len(kept)
        if not len(kept):
            return
        self.count += len(kept)
        wide = kept.double()
        self._sum += wide.sum(0)
        self._squares += wide.square().sum(0)
        self.absmax = torch.maximum(self.absmax, kept.abs().amax(0).float())
        if self._gram is not None:
            kept = kept.to(self._gram.dtype)
            self._gram.addmm_(kept.T, kept)

    @property
    def mean(self) -> Tensor:
        """E[x], [K], float64."""
        return self._sum / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        """E[x^2], [K], float64; zero for an input that is always zero."""
        return self._squares / max(self.count, 1)

    def hessian(self, columns: Tensor | None = None) -> Tensor:
        """E[x x^T], [K, K]; half the Hessian of the squared error. Raises ValueError if it was not kept."""
        if self._gram is None:
            raise ValueError("statistics: the Hessian was not kept: Statistics(k, hessian=True)")
        gram = self._gram.clone() if columns is None else self._gram[columns[:, None], columns]
        return gram.div_(max(self.count, 1))

    def mean_square(self, rows: Tensor) -> Tensor:
        """E[(r x)^2] for each row r of [N, K], [N]: exact with the Hessian; without, as if inputs were uncorrelated."""
        if self._gram is None:
            return rows.square() @ self.second_moment.to(rows.dtype)
        rows = rows.to(self._gram.dtype)
        return (rows @ self._gram).mul_(rows).sum(1).div_(max(self.count, 1))

    def equalized(self, factors: Tensor) -> Statistics:
        """Statistics of the inputs divided by `factors` [K]."""
        other = Statistics(len(factors), device=factors.device)
        other.count, other.left_out = self.count, self.left_out
        other.absmax = self.absmax / factors
        other._sum, other._squares = self._sum / factors, self._squares / factors.double().square()
        if self._gram is not None:
            other._gram = self._gram / factors / factors[:, None]
        return other
