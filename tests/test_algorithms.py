"""Each algorithm against a property that does not depend on how it works."""

import pytest
import torch

from fp6_compile.algorithms import GPTQ, RTN, Clip, Statistics, Weighted, output_error
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
    torch.testing.assert_close(stats.hessian, wide.T @ wide / 200)
    assert torch.equal(stats.absmax, x.abs().amax(0))


def test_tokens_with_nan_are_left_out_and_counted():
    _, x = _layer(0)
    bad = x.clone()
    bad[3, 5], bad[9, 0] = torch.nan, torch.inf
    stats, clean = Statistics.of(bad, hessian=True), Statistics.of(x[[i for i in range(200) if i not in (3, 9)]], True)
    assert (stats.count, stats.left_out) == (198, 2)
    torch.testing.assert_close(stats.hessian, clean.hessian)
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
    h = stats.hessian
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
