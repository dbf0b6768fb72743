"""Scales and codes: error bounds, groups, zero rows, bad weights, and the signal-to-noise table of the design."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fp6_compile import PackedTensor
from fp6_compile.formats import FORMATS
from fp6_compile.quantize import dequantize, quantize, sqnr
from tests.support.references import SIX_BITS

E3M2 = FORMATS["e3m2"]


def _sqnr(w: torch.Tensor, fmt: str, group_size: int | None, scale: str = "absmax") -> float:
    codes, s = quantize(w, FORMATS[fmt], group_size, scale)
    return sqnr(w, dequantize(codes, s, FORMATS[fmt], group_size, torch.float64))


def test_sqnr_of_known_noise():
    weight = torch.ones(8, 8)
    assert sqnr(weight, weight + 0.1) == pytest.approx(20, abs=1e-4)
    assert (sqnr(weight, weight), sqnr(0 * weight, weight)) == (math.inf, -math.inf)
    large = torch.arange(-9.0, 1 << 21).expand(10, 1, -1)  # more than one of the pieces that it is computed in
    rounded = large.bfloat16()
    expected = 10 * torch.log10(large.double().square().sum() / (large.double() - rounded.double()).square().sum())
    assert sqnr(large, rounded) == pytest.approx(float(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [None, 32, 64, 7, 1000])
@pytest.mark.parametrize("fmt", SIX_BITS.values(), ids=SIX_BITS)
def test_error_is_within_half_a_step(fmt, group_size, dtype):
    """Nearest means: off by at most half the spacing at the top binade, which is scale * 2^(emax - m) / 2.

    Slack: scale, quotient and product are each rounded to float32, 3 * 2^-24 of a value at most 2^(m + 2) half steps large.
    """
    w = torch.randn(33, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scale = quantize(w, fmt, group_size)
    assert codes.shape == (33, 100)
    assert scale.shape == (-(-100 // (group_size or 100)), 33)
    assert scale.dtype == torch.float32
    half_step = fmt.max / (2 - 2.0**-fmt.mantissa_bits) * 2.0**-fmt.mantissa_bits / 2
    bound = scale.T.repeat_interleave(group_size or 100, 1)[:, :100] * half_step
    error = (dequantize(codes, scale, fmt, group_size, torch.float32) - w.float()).abs()
    assert (error <= bound * (1 + 3 * 2**-24 * 2 ** (fmt.mantissa_bits + 2))).all()


def test_absmax_lands_on_the_largest_code():
    w = torch.tensor([[1.0, -3.5, 0.25]])
    codes, scale = quantize(w, E3M2)
    assert scale.item() == 3.5 / 28
    assert codes[0, 1].item() == 0b1_111_11


def test_rows_of_zeros():
    w = torch.zeros(4, 64)
    w[1] = 1.0
    codes, scale = quantize(w, E3M2, 32)
    assert_close(dequantize(codes, scale, E3M2, 32, torch.float32), w, rtol=0, atol=0)
    assert (scale[:, 0] == 1).all()


def test_smallest_and_largest_floats():
    w = torch.tensor([[2.0**-149, 0.0], [torch.finfo(torch.float32).max, 1.0], [-65504.0, 1e-7]])
    codes, scale = quantize(w, E3M2)
    assert scale.isfinite().all()
    assert dequantize(codes, scale, E3M2, None, torch.float32).isfinite().all()


def test_strided_weight():
    w = torch.randn(64, 48)
    assert_close(quantize(w.T, E3M2), quantize(w.T.contiguous(), E3M2), rtol=0, atol=0)


def test_empty_weight():
    for shape in [(0, 64), (64, 0)]:
        codes, scale = quantize(torch.empty(shape), E3M2)
        assert dequantize(codes, scale, E3M2, None, torch.float32).shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad):
    w = torch.ones(4, 8)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="weight: 1 of 32 values are NaN or infinite"):
        quantize(w, E3M2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": torch.ones(4)}, r"weight: got torch\.float32 of shape \[4\], needs a floating-point matrix"),
        ({"weight": torch.ones(4, 4, dtype=torch.int8)}, r"weight: got torch\.int8 of shape \[4, 4\]"),
        ({"group_size": 0}, "group_size: got 0, needs a positive number or None"),
        ({"scale": "max"}, r"scale: got 'max', known scales are \['absmax', 'mse'\]"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        quantize(**{"weight": torch.ones(4, 4), "fmt": E3M2, **kwargs})


def test_mse_scale_never_loses_to_absmax():
    w = torch.distributions.StudentT(4.0).sample((64, 512))
    for fmt in SIX_BITS:
        assert _sqnr(w, fmt, 64, "mse") >= _sqnr(w, fmt, 64, "absmax")


DISTRIBUTIONS = {
    "Gaussian": torch.distributions.Normal(0.0, 1.0),
    "Laplace": torch.distributions.Laplace(0.0, 1.0),
    "Student t, 4 degrees": torch.distributions.StudentT(4.0),
}
# The design's table: decibels per row and per group of 64.
SQNR = {
    ("e3m2", "Gaussian"): (25.6, 26.0),
    ("e3m2", "Laplace"): (25.6, 26.5),
    ("e3m2", "Student t, 4 degrees"): (25.7, 26.8),
    ("e2m3", "Gaussian"): (30.9, 31.8),
    ("e2m3", "Laplace"): (28.9, 31.7),
    ("e2m3", "Student t, 4 degrees"): (24.8, 31.5),
}


@pytest.mark.parametrize(("fmt", "distribution"), SQNR)
def test_sqnr_of_synthetic_weights(fmt, distribution):
    """256 x 4096, the mean of four draws: a heavy tail hangs on each row's largest value (24.6 to 25.2 for E2M3 by row)."""
    torch.manual_seed(0)
    samples = [DISTRIBUTIONS[distribution].sample((256, 4096)) for _ in range(4)]
    found = [sum(_sqnr(w, fmt, size) for w in samples) / len(samples) for size in (None, 64)]
    assert found == pytest.approx(SQNR[fmt, distribution], abs=0.3)


def _rows_of_the_results() -> list[tuple[str, int | None, float, float]]:
    """(format, group size, bits per weight, decibels) of the table of the shipped model."""
    text = (Path(__file__).parent.parent / "docs/results/accuracy.md").read_text()
    rows = re.findall(
        r"^\| (E\dM\d), (?:groups of (\d+)|per channel) \| ([\d.]+) \|.*\| ([\d.]+) \|$", text, re.MULTILINE
    )
    return [(fmt.lower(), int(size) if size else None, float(bits), float(db)) for fmt, size, bits, db in rows]


def test_table_of_the_results():
    """Bits per weight, scales included, and signal to noise of the shipped code model's linears."""
    pytest.importorskip("safetensors", reason="safetensors is an optional extra")
    from examples.code_lm.checkpoint import load_pretrained

    linears = [module.weight.half() for module in load_pretrained().modules() if isinstance(module, torch.nn.Linear)]
    rows = _rows_of_the_results()
    assert {fmt for fmt, *_ in rows} == set(SIX_BITS)
    for fmt, group_size, bits, decibels in rows:
        packed = [PackedTensor.quantize(weight, fmt, group_size) for weight in linears]
        noise = sum((p.dequantize(torch.float32) - w).square().sum() for p, w in zip(packed, linears, strict=True))
        signal = sum(w.float().square().sum() for w in linears)
        assert float(10 * torch.log10(signal / noise)) == pytest.approx(decibels, abs=0.06)
        used = 8 * sum(p.packed_bytes for p in packed) / sum(w.numel() for w in linears)
        assert used == pytest.approx(bits, abs=0.006)
