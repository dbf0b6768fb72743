"""The quantizer in C++: the same bits as in torch, whatever the weight."""

import pytest
import torch

from fp6_compile.formats import FORMATS
from fp6_compile.kernels.cpu import build
from fp6_compile.kernels.cpu import quantize as cpu
from fp6_compile.layouts.packing import CPU, PLANES, pack
from fp6_compile.quantize import quantize
from tests.support.references import SIX_BITS

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")


def _same(weight: torch.Tensor, fmt: str, group_size: int | None) -> None:
    codes, scale = quantize(weight, FORMATS[fmt], group_size)
    actual = cpu.quantize(weight, FORMATS[fmt], group_size)
    torch.testing.assert_close(actual, (*pack(codes, FORMATS[fmt], CPU), scale), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [None, 64, 7, 1000])
@pytest.mark.parametrize("fmt", SIX_BITS)
def test_same_bits(fmt, group_size, dtype):
    """Rows of all magnitudes, subnormal ones among them, a row of zeros, and shapes that no tile divides."""
    generator = torch.Generator().manual_seed(0)
    for n, k in ((67, 1000), (1, 1), (5, 63), (16, 256)):
        magnitudes = 10.0 ** torch.randint(-9, 4, (n, 1), generator=generator)
        weight = (torch.randn(n, k, generator=generator) * magnitudes).to(dtype)
        weight[n // 2] = 0
        _same(weight, fmt, group_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", SIX_BITS)
def test_every_16_bit_number(fmt, dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = bits[bits.isfinite()]
    _same(finite[: finite.numel() // 64 * 64].view(-1, 64), fmt, None)
    _same(finite[: finite.numel() // 64 * 64].view(64, -1), fmt, 16)


@pytest.mark.parametrize("fmt", SIX_BITS)
def test_ties_go_to_even(fmt):
    """All midpoints of neighbouring values, and the floats next to them, at a scale of one."""
    values = FORMATS[fmt].values()[:32]
    middle = (values[1:] + values[:-1]) / 2
    near = [middle, *(torch.nextafter(middle, torch.tensor(to)) for to in (0.0, torch.inf))]
    weight = torch.cat([*near, *(-part for part in near), values[-1:]])[None]
    _same(weight, fmt, None)


@pytest.mark.parametrize("fmt", SIX_BITS)
def test_quotients_are_rounded_once(fmt):
    """Scales that have no good inverse (a mantissa of ones), or whose inverse may underflow, and quotients near ties."""
    generator = torch.Generator().manual_seed(0)
    ones = torch.tensor(2 - 2.0**-23)
    values = FORMATS[fmt].values()[:32]
    middle = (values[1:] + values[:-1]) / 2
    for scale in (ones, ones / 2**40, 1 + torch.rand((), generator=generator), torch.tensor(1e35), torch.tensor(1e-30)):
        near = torch.randint(-3, 4, (40, 31), generator=generator) * 2.0**-23
        weight = torch.cat([middle * scale * (1 + near), torch.full((40, 1), float(values[-1] * scale))], 1)
        _same(torch.cat([weight, -weight]), fmt, None)


def test_strided_weights():
    weight = torch.randn(96, 160).half()
    for view in (weight[:, 32:], weight.T, weight[::3], weight[5:, :70]):
        _same(view, "e3m2", 32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_leaves_to_torch_what_is_not_finite(dtype, bad):
    weight = torch.ones(5, 64, dtype=dtype)
    weight[4, 33] = bad
    assert cpu.quantize(weight, FORMATS["e3m2"], 32) is None
    weight[4, 33] = torch.finfo(dtype).max
    assert cpu.quantize(weight, FORMATS["e3m2"], 32) is not None


def test_leaves_to_torch_what_it_cannot():
    assert cpu.quantize(torch.ones(4, 4, dtype=torch.float64), FORMATS["e3m2"], None) is None
    assert cpu.quantize(torch.ones(0, 4), FORMATS["e3m2"], None) is None


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 64), (67, 1001), (5, 63), (32, 130)])
def test_repack_between_tiles_and_planes(n, k):
    codes = torch.randint(0, 64, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    fmt = FORMATS["e3m2"]
    for source, target in ((PLANES, CPU), (CPU, PLANES)):
        actual = cpu.repack(pack(codes, fmt, source), source, target, n, k)
        torch.testing.assert_close(actual, pack(codes, fmt, target), rtol=0, atol=0)


def test_repack_leaves_the_rest_to_torch():
    planes = pack(torch.zeros(4, 64, dtype=torch.uint8), FORMATS["e3m2"], PLANES)
    assert cpu.repack(planes, PLANES, "gpu_tiles_fp16.v1", 4, 64) is None
    assert cpu.repack(planes, PLANES, CPU, 8, 64) is None, "planes of another shape are not read"
    assert cpu.repack([plane.to("meta") for plane in planes], PLANES, CPU, 4, 64) is None
