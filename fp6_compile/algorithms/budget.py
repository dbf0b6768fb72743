"""Which format each weight gets, so that a model's error is least at a given size.

The model's error is taken to be the sum of the errors of its weights, each times the weight's sensitivity: the second-order
model of HAWQ-V2 (arXiv 1911.03852, section 3). One choice per weight under a sum of sizes is a knapsack. Its Lagrangian
relaxation (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans. ASSP 36 (9),
1988) is solved by walking: from the smallest choices, always the step along a weight's convex hull that saves most error
per bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Choice(NamedTuple):
    """One way to store a weight: its size in bits, scales included, and the error that it brings."""

    size: int
    error: float


def allocate(choices: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """For every weight, the index of one of its choices; the sizes add up to at most `budget`, in bits.

    Raises ValueError if the smallest choices are larger than that.
    """
    hulls = [_hull(of_weight) for of_weight in choices]
    taken = [hull[0] for hull in hulls]
    left = budget - sum(choices[weight][index].size for weight, index in enumerate(taken))
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
        if taken[weight] == here and size <= left:
            taken[weight], left = there, left - size
    return taken


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
