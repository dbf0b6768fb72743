"""Learned rounding: AdaRound (arXiv 2004.10568, section 3); on minifloats, arXiv 2311.12359.

Each weight is rounded to one of the two numbers of the grid next to it. Which one is learned: h in [0, 1], a rectified
sigmoid of a free variable, says how far up it goes, and Adam minimizes the layer's squared output error plus a term that
drives every h to 0 or 1. The output error is e E[x x^T] e^T, from the Hessian, so that the inputs need not be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.base import Needs, Quantized, Refinement, better_rows, per_weight
from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid


@dataclass(frozen=True)
class LearnedRounding(Refinement):
    """Codes learned on the scales of `base`; without statistics it is `base`.

    A row whose output error on the calibration inputs it does not lower keeps the codes of `base`.

    Args:
        base: chooses the scales.
        steps: of Adam, each two matmuls of [N, K] by [K, K].
        rate: Adam's learning rate.
    """

    steps: int = 300
    rate: float = 0.02
    needs = Needs.HESSIAN

    def refine(self, weight: Tensor, start: Quantized, stats: Statistics | None) -> Quantized:
        """The same scales with learned codes."""
        if stats is None:
            return start
        target, scale = weight.float(), per_weight(start.scale, start.group_size, weight.shape[1])
        down, up = neighbours(target / scale, start.grid)
        low, high = start.grid.decode(down) * scale, start.grid.decode(up) * scale
        go_up = self._learn(target, low, high, stats.hessian().float()) >= 0.5
        return better_rows(weight, start, torch.where(go_up, up, down), stats)

    def _learn(self, target: Tensor, low: Tensor, high: Tensor, hessian: Tensor) -> Tensor:
        """h [N, K], for weights `target` between `low` and `high`; at first low + h (high - low) is `target` itself."""
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
                # The paper's schedule: a fifth of the steps without the term, then a smaller exponent with every step.
                beta = 20 - 18 * i / self.steps
                undecided = (1 - (2 * h - 1).abs().pow(beta)).mean() if i > self.steps // 5 else 0.0
                loss = ((error @ hessian) * error).sum() / unit + i / self.steps * undecided
                adam.zero_grad()
                loss.backward()
                adam.step()
        return _rectified_sigmoid(inner.detach())


def neighbours(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes of the grid's largest number not above each value and of its smallest not below; outside, its end for both."""
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
