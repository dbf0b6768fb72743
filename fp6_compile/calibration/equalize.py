"""Equalization of a block (SmoothQuant, arXiv 2211.10438): inputs k are divided by s_k, weights are multiplied by it.

s_k = max|x_k|^a / max|w_k|^(1 - a), equation 4 there, over all calibration inputs and all linears with that input. The
division is folded into the weight (and bias) of the norm that computes the input: nothing more runs than before, and the
model is the same in exact arithmetic.

A norm is found while the block runs: the module with a weight [K] whose output is the very tensor that the linears get.
Only a second run tells whether something else reads that tensor too, or the norm multiplies by 1 + weight: unless the block
then returns what it returned before, up to rounding, its parameters are put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp6_compile.calibration.chain import Chain
from fp6_compile.calibration.collect import Collector
from fp6_compile.packed.slots import Slot

# Two correct runs differ by roundings of weights and products; a fold that is wrong makes a difference like the factors'.
_ROUNDINGS = 8


def equalize_(chain: Chain, index: int, part: list[Slot], collector: Collector, alpha: float) -> dict[str, Tensor]:
    """Equalize block `index`, whose parameters are `part`, where that is possible; statistics of `collector` follow.

    Returns the new parameters by name.
    """
    changed: dict[str, Tensor] = {}
    for norm, linears, shared in collector.behind_norms():
        slots = {id(slot.tensor): slot for slot in part}
        weights = [linear.get_parameter("weight") for linear in linears]
        old = [*norm.parameters(), *weights]
        if not all(id(tensor) in slots for tensor in old):
            continue  # shared with other blocks
        factors = equalizing_factors(shared.stats.absmax, weights, alpha)
        before = next(chain.run(index))
        _put(slots, old, fold([*norm.parameters()], weights, factors))
        if _same(before, next(chain.run(index)), chain.hidden[0]):
            shared.stats = shared.stats.equalized(factors)
            changed |= {slot.names[0]: slot.tensor for slot in (slots[id(tensor)] for tensor in old)}
        else:
            _put(slots, old, old)
    return changed


def equalizing_factors(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s [K] from the inputs' largest magnitudes `absmax` [K] and weights [N, K]; their geometric mean is one.

    An input that is always zero, or whose weights all are, gets 1.
    """
    weight = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    alive = (absmax > 0) & (weight > 0)
    logs = alpha * absmax.clamp(min=1e-30).log() - (1 - alpha) * weight.clamp(min=1e-30).log()
    mean = logs[alive].mean() if alive.any() else logs.new_zeros(())
    return torch.where(alive, (logs - mean).exp(), 1.0)


def fold(norm: Sequence[Tensor], weights: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """The norm's parameters [K] divided by `factors`, then the linears' weights [N, K] times them, each in its dtype."""
    new = [p.detach().float() / factors for p in norm] + [w.detach().float() * factors for w in weights]
    return [value.to(old.dtype) for value, old in zip(new, [*norm, *weights], strict=True)]


def _put(slots: dict[int, Slot], old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for tensor, value in zip(old, new, strict=True):
        slots[id(tensor)].put(value)


def _same(before: Tensor, after: Tensor, hidden: Tensor) -> bool:
    """Whether what the block adds to its input `hidden` is the same, up to rounding."""
    added = (before.float() - hidden.float()).norm()
    allowed = _ROUNDINGS * torch.finfo(before.dtype).eps * torch.maximum(added, before.float().norm() / 8)
    return bool((after.float() - before.float()).norm() <= allowed)
