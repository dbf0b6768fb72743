"""Formats and rounding: the tables of values, and nearest-even against an independent search."""

import pytest
import torch
from torch.testing import assert_close

from fp6_compile.formats import FORMATS, get_format

E3M2, E2M3 = FORMATS["e3m2"], FORMATS["e2m3"]


def _codes(fmt) -> torch.Tensor:
    """Those of finite values: with five exponent bits the largest exponent is no number's."""
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    return codes[(codes & fmt.sign - 1) <= fmt.max_code]


def _by_definition(fmt) -> torch.Tensor:
    """(-1)^s 2^(e - bias) 1.m, or 2^(1 - bias) 0.m where e = 0, code by code in float64."""
    values = []
    for code in range(2**fmt.bits):
        e, m = code >> fmt.mantissa_bits & (2**fmt.exponent_bits - 1), code & (2**fmt.mantissa_bits - 1)
        fraction = m / 2**fmt.mantissa_bits
        value = (1 + fraction) * 2.0 ** (e - fmt.bias) if e else fraction * 2.0 ** (1 - fmt.bias)
        values.append(-value if code & fmt.sign else value)
    return torch.tensor(values, dtype=torch.float64)


def test_named_constants():
    assert (E3M2.bias, E3M2.max, E3M2.bits) == (3, 28.0, 6)
    assert (E2M3.bias, E2M3.max, E2M3.bits) == (1, 7.5, 6)
    assert E3M2.exponent_rescale(torch.float16) == 2.0**12
    assert E3M2.exponent_rescale(torch.bfloat16) == 2.0**124
    assert E2M3.exponent_rescale(torch.float16) == 2.0**14
    assert E2M3.exponent_rescale(torch.bfloat16) == 2.0**126


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_decode_all_codes(fmt):
    codes = _codes(fmt)
    assert_close(fmt.decode(codes).double(), _by_definition(fmt)[codes.long()], rtol=0, atol=0)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_encode_inverts_decode(fmt):
    assert_close(fmt.encode(fmt.decode(_codes(fmt))), _codes(fmt), rtol=0, atol=0)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_encode_is_nearest_even(fmt):
    """Every midpoint of neighbours and the floats next to it against a search over all magnitudes."""
    magnitudes = _by_definition(fmt)[: fmt.max_code + 1].float()
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(v)) for v in (0.0, torch.inf)]
    x = torch.cat([middle, *near, torch.tensor([1e9, fmt.max * 1.01, 1e-30, 0.0])])
    x = torch.cat([x, -x])
    distance = (x.abs().double()[:, None] - magnitudes.double()).abs()
    # argmin takes the first of equals; look at even codes first.
    even_first = torch.cat([torch.arange(first, fmt.max_code + 1, 2) for first in (0, 1)])
    if fmt.mantissa_bits == 0:  # an even number of steps of its own size
        even_first = torch.tensor([0, *range(fmt.max_code, 0, -1)])
    nearest = even_first[distance[:, even_first].argmin(1)]
    assert_close(fmt.encode(x).long() & fmt.sign - 1, nearest, rtol=0, atol=0)
    assert_close(fmt.encode(x) >= fmt.sign, torch.signbit(x))


def test_unknown_format_lists_the_known():
    with pytest.raises(ValueError, match=r"format: got 'e9m9', known formats are \['e1m1', .*'e3m2'"):
        get_format("e9m9")
