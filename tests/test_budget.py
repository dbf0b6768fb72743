"""Formats under a budget: never over it, and as good as trying everything."""

import itertools
import random

import pytest
import torch

from fp6_compile import sensitivities
from fp6_compile.calibration.algorithms import Quantized
from fp6_compile.formats import Format
from fp6_compile.packed.budget import Choice, allocate, choose_formats
from fp6_compile.quantize import quantize


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


FORMATS = [Format(f"e2m{m}", 2, m) for m in (1, 2, 3, 4)]


def _weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, k, generator=generator) for n, k in ((128, 256), (512, 256), (128, 512))]


@pytest.mark.parametrize(("target", "group"), [(4.25, None), (5, None), (5.5, 64), (6.1, None), (9, None)])
def test_formats_keep_to_the_target(target, group):
    weights = _weights()
    formats = choose_formats([(w, None) for w in weights], FORMATS, target, group)
    bits = [8 * Quantized(f, group, *quantize(w, f, group)).bytes for w, f in zip(weights, formats, strict=True)]
    assert sum(bits) <= target * sum(w.numel() for w in weights)
    # Nothing is left that would have bought the next format of the smallest weight.
    best = FORMATS[-1]
    if any(f != best for f in formats):
        assert sum(bits) + min(w.numel() for w, f in zip(weights, formats, strict=True) if f != best) > target * sum(
            w.numel() for w in weights
        )
    else:
        assert target == 9


def test_without_one_large_weights_are_taken_to_matter():
    weights = [torch.randn(128, 256, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    weights[2] *= 5
    bits = [f.bits for f in choose_formats([(w, None) for w in weights], FORMATS, 5.4)]
    assert bits[2] == max(bits) > min(bits)


def test_a_measured_sensitivity_decides():
    weights = _weights()
    for favoured in range(3):
        given = [(w, 100.0 if i == favoured else 1e-3) for i, w in enumerate(weights)]
        bits = [f.bits for f in choose_formats(given, FORMATS, 5.6)]
        assert bits[favoured] == max(bits) > min(bits)


def test_a_target_below_the_smallest_format_is_refused():
    with pytest.raises(ValueError, match=r"target_bits: got 4, needs at least 4.11, scales counted"):
        choose_formats([(w, None) for w in _weights()], FORMATS, 4)


def test_sensitivities_of_a_sum_are_its_terms():
    """The loss weighs the squared relative error of each layer: what is measured is that weight."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(128, 128, bias=False) for name in ("a", "b", "skipped")})
    before = {name: linear.weight.detach().clone() for name, linear in model.items()}
    factors = {"a": 3.0, "b": 0.5, "skipped": 7.0}

    def loss():
        errors = {n: (m.weight - before[n]).square().sum() / before[n].square().sum() for n, m in model.items()}
        return 11.0 + sum(factors[name] * float(error) for name, error in errors.items())

    found = sensitivities(model, loss, skip=["skipped"], include_float32=True)
    assert found == {"a": pytest.approx(3.0, rel=1e-4), "b": pytest.approx(0.5, rel=1e-4)}
    assert all(torch.equal(model[name].weight, weight) for name, weight in before.items())
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more")
        return 0.0

    with pytest.raises(RuntimeError, match="no more"):
        sensitivities(model, fails, include_float32=True)
    assert all(torch.equal(model[name].weight, weight) for name, weight in before.items())
