"""Equalization: large inputs are divided by what the weights that multiply them are multiplied by.

SmoothQuant (arXiv 2211.10438, equation 4): s_k = max|x_k|^a / max|w_k|^(1 - a), over all tokens and all linears that share
the input. The division is folded into the weight (and bias) of the norm that makes the input, so that nothing runs that did
not before, and in exact arithmetic the model is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def equalizing_factors(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s [K] for the inputs' largest magnitudes `absmax` [K] and weights [N, K]; their geometric mean is one.

    An input that is dead, or has no weight, gets 1.
    """
    weight = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    alive = (absmax > 0) & (weight > 0)
    logs = alpha * absmax.clamp(min=1e-30).log() - (1 - alpha) * weight.clamp(min=1e-30).log()
    mean = logs[alive].mean() if alive.any() else logs.new_zeros(())
    return torch.where(alive, (logs - mean).exp(), 1.0)


def fold(norm: Sequence[Tensor], weights: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """What the norm's parameters [K] and then the linears' weights [N, K] become, each in its dtype."""
    new = [p.detach().float() / factors for p in norm] + [w.detach().float() * factors for w in weights]
    return [value.to(old.dtype) for value, old in zip(new, [*norm, *weights], strict=True)]
