"""Each algorithm against a property that does not depend on how it works."""

import pytest
import torch

from benchmarks.accuracy.grids import Asymmetric, Integer, Power, nupes
from fp6_compile import formats as all_formats
from fp6_compile.calibration.algorithms import (
    GPTQ,
    RTN,
    BiasCorrection,
    Clip,
    LearnedRounding,
    LoRC,
    PowerOfTwo,
    Search,
    Statistics,
    Weighted,
    output_error,
)
from fp6_compile.calibration.algorithms.learned_rounding import neighbours
from fp6_compile.formats import Format
from fp6_compile.quantize import dequantize, quantize

FORMATS = [Format("e3m2", 3, 2), Format("e2m3", 2, 3), Format("e2m1", 2, 1)]
E3M2, E2M3, E2M1 = FORMATS
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
groups = pytest.mark.parametrize("group_size", [None, 32])


def _layer(seed: int, n: int = 48, k: int = 80, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs of unequal size, one of them dead."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g)
    x = (x + torch.randn(tokens, k, generator=g) / 4 + 0.2) * torch.rand(k, generator=g).exp()
    x[:, 7] = 0
    return torch.randn(n, k, generator=g) / 16, x


def _error(weight: torch.Tensor, approximation: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of each output, the mean squared error, computed from the inputs themselves in float64."""
    return ((approximation.double() - weight.double()) @ x.double().T).square().mean(1)


def test_statistics_are_those_of_all_batches():
    _, x = _layer(0)
    stats = Statistics(80, hessian=True, dtype=torch.float64)
    for batch in x.split(70):
        stats.add(batch[None])
    assert stats.count == 200
    wide = x.double()
    torch.testing.assert_close(stats.mean, wide.mean(0))
    torch.testing.assert_close(stats.second_moment, wide.square().mean(0))
    torch.testing.assert_close(stats.hessian(), wide.T @ wide / 200)
    assert torch.equal(stats.absmax, x.abs().amax(0))


def test_tokens_with_nan_are_left_out_and_counted():
    _, x = _layer(0)
    bad = x.clone()
    bad[3, 5], bad[9, 0] = torch.nan, torch.inf
    stats, clean = Statistics.of(bad, hessian=True), Statistics.of(x[[i for i in range(200) if i not in (3, 9)]], True)
    assert (stats.count, stats.left_out) == (198, 2)
    torch.testing.assert_close(stats.hessian(), clean.hessian())
    assert torch.equal(stats.absmax, clean.absmax)


def test_output_error_is_that_of_the_inputs():
    w, x = _layer(0)
    q = RTN()(w, E3M2, 32).dequantize()
    found = output_error(w, q, Statistics.of(x, hessian=True, dtype=torch.float64))
    torch.testing.assert_close(found, _error(w, q, x), rtol=1e-5, atol=0)


def test_rtn_is_quantize():
    w, _ = _layer(0)
    q = RTN()(w, E3M2, 32)
    codes, scale = quantize(w, E3M2, 32)
    assert torch.equal(q.codes, codes)
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.dequantize(), dequantize(codes, scale, E3M2, 32, torch.float32))
    assert q.bytes == 48 * 80 * 6 // 8 + 4 * 3 * 48


@formats
@groups
def test_clip_never_loses_to_rtn_and_weighted_never_on_its_objective(fmt, group_size):
    w, x = _layer(1)
    stats = Statistics.of(x)
    rtn, clip, weighted = (a(w, fmt, group_size, stats).dequantize() for a in (RTN(), Clip(), Weighted()))
    assert (output_error(w, clip, None) <= output_error(w, rtn, None)).all()
    for other in (rtn, clip):
        assert (output_error(w, weighted, stats) <= output_error(w, other, stats) * (1 + 1e-5)).all()
    assert torch.equal(Weighted()(w, fmt, group_size).codes, Clip()(w, fmt, group_size).codes)


@formats
@groups
def test_gptq_never_loses_to_rtn_on_its_calibration_set(fmt, group_size):
    for seed in range(4):
        w, x = _layer(seed)
        stats = Statistics.of(x, hessian=True)
        for base in (RTN(), Weighted(steps=8)):
            rtn, gptq = (a(w, fmt, group_size, stats).dequantize() for a in (base, GPTQ(base)))
            lost, found = _error(w, rtn, x), _error(w, gptq, x)
            assert (found <= lost * (1 + 1e-5)).all()
            assert found.sum() < 0.7 * lost.sum(), "and it is of use"


def test_gptq_does_what_the_paper_says():
    """Algorithm 1 written out, one row and one input at a time, in float64."""
    w, x = _layer(2, n=5, k=40)
    stats = Statistics.of(x, hessian=True, dtype=torch.float64)
    h = stats.hessian()
    h += 0.01 * h.diagonal().mean() * torch.eye(40)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    scale = RTN()(w, E2M1, None).scale[0].double()
    left, codes = w.double().clone(), torch.empty(5, 40, dtype=torch.uint8)
    for k in range(40):
        codes[:, k] = E2M1.encode(left[:, k] / scale)
        error = (left[:, k] - E2M1.decode(codes[:, k]).double() * scale) / upper[k, k]
        left[:, k:] -= error[:, None] * upper[k, k:]
    found = GPTQ(order=False)(w, E2M1, None, stats)
    taken = (found.codes == codes).all(1)
    assert taken.sum() >= 4, "a row may keep its nearest codes"
    assert (found.codes[~taken] == RTN()(w, E2M1, None).codes[~taken]).all()


def test_gptq_does_not_depend_on_the_order_of_inputs():
    w, x = _layer(3)
    columns = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    found = GPTQ()(w, E3M2, None, Statistics.of(x, True, torch.float64)).codes
    permuted = GPTQ()(w[:, columns], E3M2, None, Statistics.of(x[:, columns], True, torch.float64)).codes
    assert torch.equal(permuted, found[:, columns])


def test_dead_inputs_are_rounded_to_nearest():
    w, x = _layer(4)
    x[:, [1, 7, 40]] = 0
    found = GPTQ()(w, E3M2, 32, Statistics.of(x, hessian=True))
    assert torch.equal(found.codes[:, [1, 7, 40]], RTN()(w, E3M2, 32).codes[:, [1, 7, 40]])
    all_dead = Statistics.of(torch.zeros(9, 80), hessian=True)
    assert torch.equal(GPTQ()(w, E3M2, 32, all_dead).codes, RTN()(w, E3M2, 32).codes)
    assert Weighted()(w, E3M2, 32, all_dead).scale.isfinite().all()


def test_fewer_tokens_than_inputs():
    w, x = _layer(5, tokens=3)
    stats = Statistics.of(x, hessian=True)
    assert (
        _error(w, GPTQ()(w, E2M1, None, stats).dequantize(), x) <= _error(w, RTN()(w, E2M1, None).dequantize(), x)
    ).all()
    GPTQ(damping=0)(w, E2M1, None, stats)


def test_without_statistics_gptq_is_its_base():
    w, _ = _layer(6)
    assert torch.equal(GPTQ(Clip())(w, E3M2, 32).codes, Clip()(w, E3M2, 32).codes)
    with pytest.raises(ValueError, match="statistics: the Hessian was not kept"):
        GPTQ()(w, E3M2, 32, Statistics.of(torch.ones(3, 80)))


@pytest.mark.parametrize("algorithm", [RTN(), Clip(steps=4), Weighted(steps=4), GPTQ()], ids=repr)
def test_bad_weights_are_named(algorithm):
    stats, bad = Statistics.of(torch.randn(20, 8), hessian=True), torch.ones(4, 8)
    bad[2, 3] = torch.nan
    with pytest.raises(ValueError, match="weight: 1 of 32 values are NaN or infinite"):
        algorithm(bad, E3M2, None, stats)
    with pytest.raises(ValueError, match="group_size: got 0"):
        algorithm(torch.ones(4, 8), E3M2, 0, stats)


def test_lorc_at_full_rank_is_exact_to_the_factors_rounding():
    """Float32 factors leave float32's rounding; FP16 factors leave at most 2^-11 of each, and the sums' own."""
    for shape in ((48, 80), (80, 48)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 16
        error = (RTN()(w, E2M1, None).dequantize() - w).norm()
        assert (LoRC(rank=48)(w, E2M1, None).effective() - w).norm() < 1e-5 * error
        half = LoRC(rank=1000)(w.half(), E2M1, None)
        assert [factor.dtype for factor in half.low_rank] == [torch.float16] * 2
        assert (half.effective() - w.half().float()).norm() < 2**-9 * error


def test_lorc_is_the_best_of_its_rank():
    """Eckart and Young: what is left is the norm of the singular values beyond the rank."""
    w, x = _layer(1)
    plain = w - RTN()(w, E2M1, 32).dequantize()
    left = w - LoRC(rank=5)(w, E2M1, 32).effective()
    assert left.norm() == pytest.approx(float(torch.linalg.svdvals(plain)[5:].norm()), rel=1e-5)
    stats = Statistics.of(x)
    errors = [
        output_error(w, LoRC(rank=5, weighted=weighted)(w, E2M1, 32, stats).effective(), stats).sum()
        for weighted in (False, True)
    ]
    assert errors[1] < errors[0]


@formats
def test_bias_correction_makes_the_mean_error_zero(fmt):
    w, x = _layer(2)
    found = BiasCorrection(GPTQ())(w, fmt, 32, Statistics.of(x, hessian=True))
    error = x.double() @ (found.effective().double() - w.double()).T
    before, after = error.mean(0).abs(), (error + found.shift.double()).mean(0).abs()
    assert (after <= before * 2**-20 + 1e-9).all()
    assert before.max() > 1e-3


@formats
def test_learned_rounding_never_loses_to_nearest(fmt):
    for seed in range(2):
        w, x = _layer(seed)
        stats = Statistics.of(x, hessian=True)
        nearest, learned = (a(w, fmt, 32, stats) for a in (RTN(), LearnedRounding(steps=100)))
        lost, found = (_error(w, q.dequantize(), x) for q in (nearest, learned))
        assert (found <= lost * (1 + 1e-5)).all()
        assert found.sum() < 0.7 * lost.sum(), "and it is of use"
        between = (learned.dequantize() - w).abs() <= 2 * (nearest.dequantize() - w).abs().amax()
        assert between.all()


@pytest.mark.parametrize("grid", [E3M2, E2M1, Integer(4), Integer(4, halves=True), Power(4, 0.5)], ids=lambda g: g.name)
def test_neighbours_are_next_to_each_other(grid):
    values = torch.linspace(-1.3, 1.3, 997) * grid.max
    numbers = torch.tensor(
        sorted({float(v) for v in grid.decode(torch.arange(2**grid.bits, dtype=torch.uint8)) if abs(v) <= grid.max})
    )
    down, up = (grid.decode(codes) for codes in neighbours(values, grid))
    inside = values.abs() <= grid.max
    assert (down[inside] <= values[inside]).all()
    assert (up[inside] >= values[inside]).all()
    assert not ((numbers > down[:, None]) & (numbers < up[:, None])).any()
    assert torch.equal(down[~inside], grid.max * values[~inside].sign())


def test_scales_are_powers_of_two():
    w, _ = _layer(3)
    plain = RTN()(w, E3M2, 32).scale
    m1, m2 = PowerOfTwo()(w, E3M2, 32).scale, PowerOfTwo(relative=True)(w, E3M2, 32).scale
    assert (torch.frexp(m1).mantissa == 0.5).all()
    assert ((m1 >= plain) & (m1 < 2 * plain)).all()
    ratio = plain.amax(0) / m2
    assert (torch.frexp(ratio).mantissa == 0.5).all()
    assert ((m2 <= plain) & (m2 > plain / 2)).all()
    assert torch.equal(PowerOfTwo(PowerOfTwo())(w, E3M2, 32).scale, m1), "powers of two stay"
    found = GPTQ(PowerOfTwo())(w, E3M2, 32, Statistics.of(torch.randn(50, 80), hessian=True))
    assert torch.equal(found.scale, m1)


def test_search_finds_the_format_with_the_least_error():
    heavy = torch.distributions.StudentT(2.0).sample((8, 512))
    flat = torch.rand(8, 512) - 0.5
    assert [Search(RTN())(w, E3M2, None).grid.name for w in (heavy, flat)] == ["e3m2", "e1m4"]
    w, x = _layer(0)
    stats = Statistics.of(x, hessian=True)
    six = [f for f in all_formats.FORMATS.values() if f.bits == 6]
    errors = {f.name: _error(w, GPTQ()(w, f, None, stats).dequantize(), x).sum() for f in six}
    found = Search(GPTQ())(w, E3M2, None, stats)
    assert found.grid.name == min(errors, key=lambda name: errors[name])
    assert Search(RTN(), (Integer(4), E2M1))(flat, E3M2, None).grid == Integer(4)


@pytest.mark.parametrize("refine", [GPTQ, lambda base: LearnedRounding(base, steps=5)], ids=["GPTQ", "LearnedRounding"])
def test_a_refinement_uses_the_format_that_its_base_chose(refine):
    w, x = _layer(1)
    stats = Statistics.of(x, hessian=True)
    found, expected = refine(Search(RTN(), (E2M3,)))(w, E3M2, 32, stats), refine(RTN())(w, E2M3, 32, stats)
    assert found.grid == E2M3
    assert torch.equal(found.codes, expected.codes)


def test_nupes_finds_a_power_below_one_for_bell_shapes():
    bell, flat = torch.randn(16, 512), torch.rand(16, 512) - 0.5
    assert nupes(4, RTN())(bell, E2M1, None).grid.exponent < 0.8
    assert nupes(4, RTN())(flat, E2M1, None).grid.exponent > 0.9


def test_integers():
    grid = Integer(4)
    assert (grid.max, Integer(8).max) == (7, 127)
    values = torch.tensor([-9.0, -7.0, -0.5, 0.0, 0.4, 1.5, 2.5, 100.0])
    assert grid.decode(grid.encode(values)).tolist() == [-7, -7, 0, 0, 0, 2, 2, 7]
    codes = torch.arange(1, 16, dtype=torch.uint8)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    half = Integer(4, halves=True)
    codes = torch.arange(16, dtype=torch.uint8)
    assert half.decode(codes).tolist() == [i - 7.5 for i in range(16)]
    assert torch.equal(half.encode(half.decode(codes)), codes)
    assert half.decode(half.encode(torch.tensor([-99.0, 99.0]))).tolist() == [-7.5, 7.5]


def test_a_power_of_one_is_integers():
    values = torch.randn(1000).clamp(-1, 1)
    power, integer = Power(5, 1.0), Integer(5)
    torch.testing.assert_close(power.decode(power.encode(values)) * 15, integer.decode(integer.encode(values * 15)))
    codes = torch.arange(31, dtype=torch.uint8)
    for exponent in (0.3, 0.5, 0.75):
        assert torch.equal(Power(5, exponent).encode(Power(5, exponent).decode(codes)), codes)


@groups
def test_zero_points(group_size):
    """Every weight is within half a step of its group's range, whose ends are hit; GPTQ works on top."""
    w, x = _layer(4)
    w += 0.3
    found = Asymmetric()(w, Integer(4, halves=True), group_size)
    for begin in range(0, 80, group_size or 80):
        part = w[:, begin : begin + (group_size or 80)]
        error = (found.dequantize()[:, begin : begin + (group_size or 80)] - part).abs().amax(1)
        assert (error <= (part.amax(1) - part.amin(1)) / 15 / 2 * 1.0001).all()
    assert found.bytes == 48 * 80 // 2 + 8 * found.scale.numel()
    stats = Statistics.of(x, hessian=True)
    fed_back = Asymmetric(GPTQ())(w, Integer(4, halves=True), group_size, stats)
    assert _error(w, fed_back.dequantize(), x).sum() < 0.7 * _error(w, found.dequantize(), x).sum()


def test_fp8_is_a_format():
    """As torch's float8, up to its largest number; ours has no NaN and goes one step further."""
    values = torch.randn(4096) * torch.logspace(-3, 2, 4096)
    for fmt, dtype in ((Format("e4m3", 4, 3), torch.float8_e4m3fn), (Format("e5m2", 5, 2), torch.float8_e5m2)):
        kept = values[values.abs() < torch.finfo(dtype).max]
        assert torch.equal(fmt.decode(fmt.encode(kept)), kept.to(dtype).float())


@pytest.mark.parametrize(
    "grid",
    [*FORMATS, Format("e4m3", 4, 3), Integer(4), Integer(4, halves=True), Power(4, 0.5)],
    ids=lambda g: g.name,
)
def test_round_is_decode_of_encode(grid):
    """At all numbers, halfway between them, next to halfway, beyond the grid, and at subnormal floats."""
    numbers = grid.decode(torch.arange(2**grid.bits, dtype=torch.uint8)).unique()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(halfway, halfway + sign) for sign in (1.0, -1.0)]
    ends = torch.tensor([1e-45, -1e-40, 1e-20, 3e38, -3e38, 1.001 * grid.max, -2 * grid.max])
    values = torch.cat([numbers, halfway, *near, ends])
    before = values.clone()
    assert torch.equal(grid.round(values), grid.decode(grid.encode(values)))
    assert torch.equal(values, before)


@formats
@pytest.mark.parametrize("group_size", [None, 32, 7])
def test_the_hessian_weighs_pairs_of_inputs_in_a_group(fmt, group_size):
    """The objective, with the inputs themselves: each group's part of the output, as if the others were exact."""
    w, x = _layer(2)
    stats = Statistics.of(x, hessian=True)
    rtn, weighted, found = (
        a(w, fmt, group_size, stats).dequantize() for a in (RTN(), Weighted(steps=8), Weighted(steps=8, hessian=True))
    )
    size = group_size or 80
    parts = [slice(i, i + size) for i in range(0, 80, size)]
    errors = [[_error(w[:, p], q[:, p], x[:, p]) for p in parts] for q in (rtn, weighted, found)]
    for lost in errors[:2]:
        assert all((mine <= other * (1 + 1e-4) + 1e-9).all() for mine, other in zip(errors[2], lost, strict=True))
    assert sum(e.sum() for e in errors[2]) < sum(e.sum() for e in errors[1])
