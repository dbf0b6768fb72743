"""Learned rounding: AdaRound (arXiv 2004.10568, section 3); on minifloats, arXiv 2311.12359.

Each weight goes to one of its two neighbours in the grid, and which one is learned: h in [0, 1] says how far up, a rectified
sigmoid of a free variable, and Adam minimizes the layer's squared output error plus a term that drives every h to 0 or 1.
The output error is taken from the Hessian, e E[x x^T] e^T, so that the inputs need not be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.interface import Algorithm, Needs, Quantized, better_rows, per_weight
from fp6_compile.calibration.algorithms.rtn import RTN
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid


@dataclass(frozen=True)
class LearnedRounding:
    """Codes learned on the scales of `base`; a row whose output error that does not lower keeps base's codes.

    Args:
        base: finds the scales. Without statistics: base.
        steps: of Adam, each two matmuls of [N, K] by [K, K].
        rate: Adam's.
    """

    base: Algorithm = field(default_factory=RTN)
    steps: int = 300
    rate: float = 0.02
    needs = Needs.HESSIAN

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """See interface.Algorithm."""
        start = self.base(weight, grid, group_size, stats)
        if stats is None:
            return start
        k = weight.shape[1]
        scale = per_weight(start.scale, group_size, k)
        target = weight.float() - (0 if start.offset is None else per_weight(start.offset, group_size, k))
        down, up = neighbours(target / scale, grid)
        low, high = grid.decode(down) * scale, grid.decode(up) * scale
        chosen = self._learn(target, low, high, stats.hessian().float()) >= 0.5
        return better_rows(weight, start, replace(start, codes=torch.where(chosen, up, down)), stats)

    def _learn(self, target: Tensor, low: Tensor, high: Tensor, hessian: Tensor) -> Tensor:
        """h [N, K]; it starts where rounding would not change the weight."""
        step = high - low
        share = torch.where(step > 0, (target - low) / step.clamp(min=1e-30), 0.5).clamp_(0.0, 1.0)
        inner = ((share + 0.1) / 1.2).logit()
        nearest = torch.where(share >= 0.5, high, low) - target
        unit = ((nearest @ hessian) * nearest).sum().clamp(min=1e-30)
        with torch.enable_grad():
            inner.requires_grad_()
            adam = torch.optim.Adam([inner], lr=self.rate)
            for i in range(self.steps):
                h = _rectified_sigmoid(inner)
                error = low + h * step - target
                # The paper's schedule: first no pressure to choose, then a well that gets narrower.
                beta = 20 - 18 * i / self.steps
                undecided = (1 - (2 * h - 1).abs().pow(beta)).mean() if i > self.steps // 5 else 0.0
                loss = ((error @ hessian) * error).sum() / unit + i / self.steps * undecided
                adam.zero_grad()
                loss.backward()
                adam.step()
        return _rectified_sigmoid(inner.detach())


def neighbours(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes of the largest number not above and of the smallest not below each value; beyond the grid, its last twice."""
    codes = torch.arange(2**grid.bits, dtype=torch.uint8, device=values.device)
    numbers = grid.decode(codes)
    numbers, order = numbers[numbers.abs() <= grid.max].sort(stable=True)
    codes = codes[grid.decode(codes).abs() <= grid.max][order]
    last = len(numbers) - 1
    down = (torch.searchsorted(numbers, values, right=True) - 1).clamp_(0, last)
    up = torch.searchsorted(numbers, values).clamp_(0, last)
    return codes[down], codes[up]


def _rectified_sigmoid(inner: Tensor) -> Tensor:
    return (inner.sigmoid() * 1.2 - 0.1).clamp(0, 1)
