"""Formats under a budget: never over it, and as good as trying everything."""

import itertools
import random

import pytest

from fp6_compile.algorithms.budget import Choice, allocate


def _total(choices, taken):
    picked = [of_weight[index] for of_weight, index in zip(choices, taken, strict=True)]
    return sum(choice.size for choice in picked), sum(choice.error for choice in picked)


def _random(seed):
    draw = random.Random(seed)
    return [
        [Choice(bits * draw.choice([1, 2, 4]), draw.random() * 4.0**-bits) for bits in (4, 5, 6, 8)] for _ in range(5)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_no_allocation_is_better_at_a_size_that_the_walk_reaches(seed):
    choices = _random(seed)
    everything = [_total(choices, taken) for taken in itertools.product(range(4), repeat=5)]
    low, high = min(size for size, _ in everything), max(size for size, _ in everything)
    for budget in range(low, high + 1):
        size, error = _total(choices, allocate(choices, budget))
        assert size <= budget
        best = min(e for s, e in everything if s <= budget)
        # The relaxation is exact where a step ends; between, what is lost is less than one step.
        assert error >= best
        steps = [abs(a.error - b.error) for of_weight in choices for a, b in itertools.combinations(of_weight, 2)]
        assert error <= best + max(steps)
    assert _total(choices, allocate(choices, high))[1] == pytest.approx(sum(min(c.error for c in w) for w in choices))


def test_a_sensitive_weight_gets_the_bits():
    plain = [Choice(bits * 100, 4.0**-bits) for bits in (4, 6)]
    sensitive = [Choice(size, 10 * error) for size, error in plain]
    assert allocate([plain, sensitive, plain], 1400) == [0, 1, 0]
    # More error for more bits is never taken, nor what a mixture of its neighbours beats.
    assert allocate([[Choice(4, 1.0), Choice(5, 0.9), Choice(6, 0.1), Choice(8, 0.5)]], 9) == [2]
    assert allocate([[Choice(4, 1.0), Choice(5, 0.9), Choice(6, 0.1)]], 5) == [0]


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="got 7 bits, the smallest choices take 8"):
        allocate([[Choice(4, 1.0)], [Choice(4, 1.0)]], 7)
