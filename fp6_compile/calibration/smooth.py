"""Equalization of a block: algorithms/equalize.py for every norm whose output goes to linears that are quantized.

Which norm that is shows when the block runs: the linears' input is the very tensor that a module with a weight [K] returned.
Whether nobody else reads it, and whether the norm multiplies by its weight (and not by 1 + weight), shows afterwards: the
block must return what it returned before, to rounding, or the norm stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.equalize import equalizing_factors, fold
from fp6_compile.calibration.chain import Chain
from fp6_compile.calibration.collect import Collector
from fp6_compile.packed.slots import Slot

# The two runs differ by roundings of weights and products; a wrong fold differs by what the factors differ from one.
_ROUNDINGS = 8


def equalize_(chain: Chain, index: int, part: list[Slot], collector: Collector, alpha: float) -> dict[str, Tensor]:
    """Equalize what can be in a block and its statistics; the new parameters by name."""
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


def _put(slots: dict[int, Slot], old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for tensor, value in zip(old, new, strict=True):
        slots[id(tensor)].put(value)


def _same(before: Tensor, after: Tensor, hidden: Tensor) -> bool:
    """Whether what the block adds to its input is the same, to rounding."""
    added = (before.float() - hidden.float()).norm()
    allowed = _ROUNDINGS * torch.finfo(before.dtype).eps * torch.maximum(added, before.float().norm() / 8)
    return bool((after.float() - before.float()).norm() <= allowed)
