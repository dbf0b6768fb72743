"""Which format each weight gets, so that a model's error is least at a given size.

The model's error is assumed to be the sum of the errors of its weights, each times the weight's sensitivity: the
second-order model of HAWQ-V2 (arXiv 1911.03852, section 3). One choice per weight under a sum of sizes is a knapsack. Its
Lagrangian relaxation (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans. ASSP 36
(9), 1988) is solved step by step: from the smallest choices on, always the step along a weight's convex hull that saves most
error per bit.

Errors are relative: the squared error of a weight over its squares, which is about that of the layer's output. How much the
model suffers from one can be measured (`fp6_compile.sensitivities`). If it was not, it is assumed to be the number of
weights times their root mean square: the geometric mean of "all relative errors are alike" and "all absolute errors are"
(docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from fp6_compile.formats import FORMATS, Format
from fp6_compile.quantize import squared_error

# Formats to mix: 4 to 8 bits, with two exponent bits or more (one is integers) and a mantissa.
MIXED = tuple(f for f in FORMATS.values() if 4 <= f.bits <= 8 and f.exponent_bits >= 2 and f.mantissa_bits >= 1)
# Weights of each matrix whose error is measured: enough for 1 %.
_SAMPLE = 1 << 16


class Choice(NamedTuple):
    """One way to store a weight: its size in bits, scales included, and the error that it brings."""

    size: int
    error: float


def choose_formats(
    weights: Iterable[tuple[Tensor, float | None]],
    candidates: Sequence[Format],
    target_bits: float,
    group_size: int | None = None,
    scale: str = "absmax",
) -> list[Format]:
    """For every weight [N, K] the format with which the error of all is least at `target_bits` a weight, scales counted.

    `weights` come with their sensitivity, the loss for each unit of relative squared error, or None; they are read one
    at a time. Raises ValueError if the candidates with the fewest bits take more than that.
    """
    choices, count = [], 0
    for weight, sensitivity in weights:
        count += weight.numel()
        rms = float(_sample(weight).square().mean().sqrt())
        factor = weight.numel() * rms if sensitivity is None else sensitivity
        choices.append([_choice(weight, fmt, group_size, scale, factor) for fmt in candidates])
    try:
        return [candidates[index] for index in allocate(choices, target_bits * count)]
    except ValueError:
        least = sum(min(choice.size for choice in of_weight) for of_weight in choices) / max(count, 1)
        raise ValueError(
            f"target_bits: got {target_bits}, needs at least {math.ceil(100 * least) / 100}, scales counted"
        ) from None


def relative_error(weight: Tensor, fmt: Format, group_size: int | None, scale: str) -> float:
    """The squared error of `weight` [N, K] in `fmt` over its squares; of some of its rows, if it is large. 0 for zeros."""
    rows = _sample(weight)
    return squared_error(rows, fmt, group_size, scale) / max(float(rows.square().sum()), 1e-30)


def _sample(weight: Tensor) -> Tensor:
    """Some rows, float32. NaN and infinite values, which nothing can pack, are zeros."""
    rows = weight[:: max(1, weight.numel() // _SAMPLE)].float()
    return rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _choice(weight: Tensor, fmt: Format, group_size: int | None, scale: str, factor: float) -> Choice:
    n, k = weight.shape
    groups = 1 if group_size is None else -(-k // group_size)
    return Choice(fmt.bits * n * k + 32 * groups * n, factor * relative_error(weight, fmt, group_size, scale))


def allocate(choices: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """For every weight, the index of one of its choices; the sizes add up to at most `budget`, in bits.

    Raises ValueError if the smallest choices are larger than that.
    """
    hulls = [_hull(of_weight) for of_weight in choices]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(choices[weight][index].size for weight, index in enumerate(chosen))
    if left < 0:
        raise ValueError(f"budget: got {budget:.0f} bits, the smallest choices take {budget - left:.0f}")
    steps = [
        (_slope(choices[weight][here], choices[weight][there]), weight, here, there)
        for weight, hull in enumerate(hulls)
        for here, there in pairwise(hull)
    ]
    # Steepest first; on a convex hull a weight's own steps then come in their order.
    for _, weight, here, there in sorted(steps):
        size = choices[weight][there].size - choices[weight][here].size
        if chosen[weight] == here and size <= left:
            chosen[weight], left = there, left - size
    return chosen


def _slope(a: Choice, b: Choice) -> float:
    """Error per bit from a to the larger b: negative."""
    return (b.error - a.error) / (b.size - a.size)


def _hull(choices: Sequence[Choice]) -> list[int]:
    """The indices on the lower convex hull, by rising size and falling error."""
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: choices[i]):
        if hull and choices[index].error >= choices[hull[-1]].error:
            continue
        while len(hull) > 1 and _slope(choices[hull[-2]], choices[hull[-1]]) >= _slope(
            choices[hull[-1]], choices[index]
        ):
            hull.pop()
        hull.append(index)
    return hull
