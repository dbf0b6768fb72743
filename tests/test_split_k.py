"""K split among programs, chunks joined into dots, and the way through ATen's matmul: interpreted."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from fp6_compile.kernels.selection import launch
from fp6_compile.kernels.triton import config, run
from fp6_compile.kernels.triton.config import Config, Device, candidates, config_for
from fp6_compile.kernels.triton.dequantize import dequantize
from fp6_compile.layouts.packing import gpu_layout, pack
from fp6_compile.quantize import dequantize as dequantize_reference
from tests.deviceless.pool import interpreted
from tests.support.kernels import (
    BF16,
    E2M3,
    E3M2,
    F16,
    F32,
    SPLIT,
    TILE,
    activations,
    check_gemm,
    check_one_hot,
    product,
    show,
    weight,
)
from tests.support.references import SIX_BITS


def run_tile(tile: Config, *args):
    return run.run(tile, *args)


def interpret(tile: Config):
    return functools.partial(interpreted, run_tile, tile)


@pytest.mark.parametrize(("tile", "m", "n", "k", "group", "fmt", "dtype", "parts"), SPLIT, ids=show)
def test_split(tile, m, n, k, group, fmt, dtype, parts):
    tile = dataclasses.replace(tile, SPLIT_K=parts)
    check_gemm(interpret(tile), activations(m, k, dtype), n, group, fmt)
    check_one_hot(interpret(tile), "cpu", m, n, k, group, fmt, dtype)


def twice(tile, *args):
    first, second = run.run(tile, *args), run.run(tile, *args)
    return torch.stack([first, second]), run._locks(args[0].device, 1)


def test_split_is_deterministic_and_leaves_no_trace():
    """The second launch finds the locks as the first did; else it would store nothing, or too early."""
    codes, scale = weight(40, 1024, None)
    layout = gpu_layout(F16)
    planes = pack(codes, E3M2, layout)
    tile = dataclasses.replace(TILE, SPLIT_K=4)
    products, locks = interpreted(twice, tile, activations(5, 1024, F16), planes, scale, E3M2, None)
    assert_close(products[0], products[1], rtol=0, atol=0)
    assert not locks.any()
    assert products.any()


JOINED = [
    (Config(128, 64, 8, 2, JOIN=4), 65, 130, 512, None, E3M2, F16),
    (Config(128, 64, 8, 2, JOIN=4), 3, 40, 300, 64, E2M3, BF16),
    (Config(32, 16, 4, 2, JOIN=8), 9, 40, 600, None, E2M3, F16),
    (Config(32, 16, 4, 2, JOIN=8), 9, 40, 600, 128, E3M2, BF16),
    (Config(32, 16, 4, 2, JOIN=2), 9, 40, 600, 32, E3M2, F16),
    (Config(32, 16, 4, 2, JOIN=2, SPLIT_K=2), 9, 40, 600, 256, E3M2, F16),
]


@pytest.mark.parametrize(("tile", "m", "n", "k", "group", "fmt", "dtype"), JOINED, ids=show)
def test_joined_chunks(tile, m, n, k, group, fmt, dtype):
    check_one_hot(interpret(tile), "cpu", m, n, k, group, fmt, dtype)
    check_gemm(interpret(tile), activations(m, k, dtype), n, group, fmt)


@pytest.mark.parametrize("group", [None, 32, 96])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
@pytest.mark.parametrize("fmt", SIX_BITS.values(), ids=SIX_BITS)
def test_dequantize_kernel(fmt, dtype, group):
    codes, scale = weight(40, 400, group)
    planes = pack(codes, fmt, gpu_layout(dtype))
    actual = interpreted(dequantize, planes, scale, fmt, group, 400, dtype)
    assert_close(actual, dequantize_reference(codes, scale, fmt, group, dtype), rtol=0, atol=0)


def aten_in_pieces(*args):
    launch._SCRATCH = 300 * 16 * 2  # two tiles of rows at a time
    return launch.aten_mm(*args)


@pytest.mark.parametrize("group", [None, 64])
def test_aten_in_pieces(group):
    """Each weight is rounded to float16 once; with one-hot inputs nothing else is, so the pieces are in their places."""
    check_one_hot(functools.partial(interpreted, aten_in_pieces), "cpu", 70, 90, 300, group, E2M3, F16)


def test_many_rows_take_atens_matmul():
    x = activations(300, 256, F16)
    assert config_for(300, 40, 256, None, F16) is None
    check_gemm(functools.partial(interpreted, launch.mm), x, 40, None, E3M2)


SHAPES = [
    (1024, 4096),
    (4096, 4096),
    (6144, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 28672),
    (128256, 4096),
    (17, 40),
]
DEVICES = [Device(arch, count) for arch, count in (("sm_80", 108), ("sm_89", 142), ("sm_90", 132), ("sm_100", 148))]
DEVICES += [Device("sm_90", 132, wgmma=True), Device("gfx942", 304), Device()]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.arch}{'-wgmma' * device.wgmma}")
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_candidates(n, k, device):
    """Few enough to time; no part of K empty; locks enough; parts that take no more bytes than the weight."""
    blocks = -(-k // 256)
    for m in (1, 8, 17, 64, 65, 128, 512, 4096):
        for group, dtype in ((None, F16), (64, BF16), (None, F32)):
            choices = candidates(m, n, k, group, dtype, device)
            assert 1 <= len(choices) <= 6
            assert len(set(choices)) == len(choices)
            for tile in filter(None, choices):
                share = -(-blocks // tile.SPLIT_K)
                assert (tile.SPLIT_K - 1) * share < blocks
                assert tile.SPLIT_K == 1 or -(-n // tile.BLOCK_N) * -(-m // tile.BLOCK_M) <= config.LOCKS
                assert tile.SPLIT_K == 1 or tile.SPLIT_K * m * 8 <= 0.75 * k
                assert (tile.JOIN > 1) <= (device.wgmma and m > 64)


@pytest.mark.parametrize(("n", "k"), [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("m", [1, 8, 16])
def test_small_weights_fill_the_device(n, k, m):
    """At least as many programs as an H200 has multiprocessors, nearly, and not a second wave."""
    tile = config_for(m, n, k, None, F16, Device("sm_90", 132))
    programs = -(-n // tile.BLOCK_N) * tile.SPLIT_K
    assert 0.9 * 132 <= programs <= 4 * 132


def test_atens_matmul_is_timed_against_the_kernel():
    hopper = Device("sm_90", 132, wgmma=True)
    assert None not in candidates(64, 4096, 4096, None, F16, hopper)
    assert candidates(128, 4096, 4096, None, F16, hopper).index(None) == 1
    assert candidates(2048, 4096, 4096, None, F16, hopper)[0] is None
    assert None not in candidates(2048, 4096, 4096, None, F32, hopper)


def test_product_of_nothing_but_tails():
    """Fewer inputs than a block, more parts asked for than blocks: parts without work add zero."""
    codes, scale = weight(17, 40, None)
    x = activations(3, 40, F16)
    tile = dataclasses.replace(TILE, SPLIT_K=3)
    assert_close(
        product(interpret(tile), x, codes, scale, E3M2, None), product(interpret(TILE), x, codes, scale, E3M2, None)
    )


def test_recorded_launches_fill_no_zeros_and_share_none(monkeypatch):
    """Zeros that were made before, other ones for each launch; and once they are used up, its own."""
    device, capturing = torch.device("meta"), []
    monkeypatch.setattr(run, "_ARENA", 100)
    monkeypatch.setattr(run, "_arenas", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    made, zeros = [], torch.zeros

    def counted(*size, **kwargs):
        made.append(size)
        return zeros(*size, **{**kwargs, "device": "cpu"})

    monkeypatch.setattr(torch, "zeros", counted)
    capturing.append(True)
    assert len(run._locks(device, 40)) == 40
    assert made == [(40,)], "nothing was prepared"
    capturing.clear()
    run._locks(device, 40)
    made.clear()
    capturing.append(True)
    first, second = run._locks(device, 40), run._locks(device, 40)
    assert made == []
    first += 1
    assert not second.any()
    assert len(run._locks(device, 40)) == 40
    assert made == [(40,)]


def test_choices_are_timed_on_random_codes(monkeypatch):
    """Not on zeros, which Inductor makes of integers; and on locks that are zeros."""
    from fp6_compile.lowerings import mm

    asked = []
    monkeypatch.setattr(mm.inductor, "autotune_select_algorithm", lambda *_, input_gen_fns: asked.append(input_gen_fns))
    plane = SimpleNamespace(
        get_size=lambda: [64, 8], get_dtype=lambda: torch.int16, get_device=lambda: torch.device("cpu")
    )
    for scratch in ([], ["parts", plane]):
        mm._best(["a tile"], ["x", plane, plane, "scale", *scratch], None, {"format": "e3m2"})
    for generators in asked:
        codes = generators[1](plane)
        assert (codes.shape, codes.dtype) == ((64, 8), torch.int16)
        assert len(codes.unique()) > 400
    assert [sorted(generators) for generators in asked] == [[1, 2], [1, 2, 5]]
    assert not asked[1][5](plane).any()
