"""Layouts: every bit used once, the byte order that is documented. That unpack inverts pack: test_properties.py."""

import pytest
import torch
from torch.testing import assert_close

from fp6_compile.formats import FORMATS
from fp6_compile.layouts.gpu_tiles import BLOCK_K, GPU_LAYOUTS, LANES, float_mask
from fp6_compile.layouts.packing import CPU, LAYOUTS, PLANES, inputs_held, layout_for, pack, rows_per_index, unpack
from tests.support.references import SIX_BITS


def _codes(n: int, k: int) -> torch.Tensor:
    return torch.randint(0, 64, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n * k))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_six_bits_a_weight(layout):
    w4, w2 = pack(_codes(32, 512), FORMATS["e3m2"], layout)
    assert (w4.nbytes, w2.nbytes) == (32 * 512 // 2, 32 * 512 // 4)
    assert w4.shape[0] == w2.shape[0] == 32 // rows_per_index(layout)


@pytest.mark.parametrize("layout", GPU_LAYOUTS.values())
def test_gpu_tiles_pack_inverts_unpack(layout):
    """Any words are the packing of some codes: no bit of a word is unused, none is read twice."""
    generator = torch.Generator().manual_seed(0)
    w4 = torch.randint(-(2**15), 2**15, (2, 3, 2, 16, 32), dtype=torch.int16, generator=generator)
    w2 = torch.randint(-(2**15), 2**15, (2, 3, 16, 32), dtype=torch.int16, generator=generator)
    for fmt in SIX_BITS.values():
        again = pack(unpack((w4, w2), fmt, layout, 32, 3 * BLOCK_K), fmt, layout)
        assert_close(again, (w4, w2), rtol=0, atol=0)


def test_planes_byte_order():
    codes = torch.tensor([[0b01_0001, 0b10_0010, 0b11_0100, 0b00_1000]], dtype=torch.uint8)
    w4, w2 = pack(codes, FORMATS["e3m2"], PLANES)
    assert w4.tolist() == [[0x21, 0x84]]
    assert w2.tolist() == [[0b00_11_10_01]]


def test_cpu_byte_order():
    """Three rows in the low six bits of three vectors, the fourth in their top bits; halves of 8 inputs take turns."""
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    codes[:, 9] = torch.tensor([1, 2, 3, 0b11_10_01])  # input 8 * 1 + 1: byte 16 * 1 + 1
    codes[:, 32] = torch.tensor([4, 5, 6, 0b01_00_00])  # input 32 + 0: byte 8
    w4, w2 = pack(codes, FORMATS["e3m2"], CPU)
    assert w4.shape == (1, 1, 2, 64)
    assert [w4[0, 0, 0, 17], w4[0, 0, 1, 17], w2[0, 0, 17]] == [0b01 << 6 | 1, 0b10 << 6 | 2, 0b11 << 6 | 3]
    assert [w4[0, 0, 0, 8], w4[0, 0, 1, 8], w2[0, 0, 8]] == [4, 5, 0b01 << 6 | 6]
    assert w4.count_nonzero() + w2.count_nonzero() == 6


def test_cpu_layout_uses_every_bit():
    generator = torch.Generator().manual_seed(0)
    w4 = torch.randint(0, 256, (3, 2, 2, 64), dtype=torch.uint8, generator=generator)
    w2 = torch.randint(0, 256, (3, 2, 64), dtype=torch.uint8, generator=generator)
    fmt = FORMATS["e3m2"]
    assert_close(pack(unpack((w4, w2), fmt, CPU, 12, 128), fmt, CPU), (w4, w2), rtol=0, atol=0)


@pytest.mark.parametrize(("key", "table"), LANES.items(), ids=lambda v: str(v[0]) if isinstance(v, tuple) else "")
def test_every_weight_has_four_bits_in_w4(key, table):
    name, dtype = key
    mask = float_mask(FORMATS[name], dtype)
    for lane in table.lanes:
        assert bin(lane.mask & mask).count("1") == 4


def test_layout_for():
    six, eight = FORMATS["e3m2"], FORMATS["e4m3"]
    assert layout_for(torch.device("cpu"), torch.float16, six) == CPU
    assert layout_for(torch.device("cpu"), torch.float16, eight) == PLANES
    assert layout_for(torch.device("cuda"), torch.bfloat16, six) == "gpu_tiles_bf16.v1"
    assert layout_for(torch.device("cuda"), torch.float32, eight) == "gpu_tiles_fp16.v1"


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt not in SIX_BITS.values()], ids=str)
def test_every_other_format(fmt):
    """Exact inverses, and as many bits a weight as the format has, in every layout that holds it."""
    codes = torch.randint(0, 2**fmt.bits, (17, 520), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for layout in (PLANES, *GPU_LAYOUTS.values()):
        planes = pack(codes, fmt, layout)
        assert_close(unpack(planes, fmt, layout, 17, 520), codes, rtol=0, atol=0)
        n, k = (17, 520) if layout == PLANES else (32, 768)
        assert sum(plane.nbytes for plane in planes) * 8 == n * k * fmt.bits
        assert inputs_held(planes, fmt, layout).inputs == k


def test_other_widths_are_refused_by_the_tiles():
    with pytest.raises(ValueError, match="layout: 'cpu.v1' holds six bits only"):
        pack(_codes(4, 64), FORMATS["e2m1"], CPU)


def test_unknown_layout_is_named():
    with pytest.raises(ValueError, match=r"layout: got 'planes\.v9', known layouts are \['planes\.v1'"):
        pack(_codes(16, 256), FORMATS["e3m2"], "planes.v9")
