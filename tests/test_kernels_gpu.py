"""The matrix kernel on the GPU: what test_kernels.py checks interpreted, and what only a device can show."""

import dataclasses
import functools

import pytest
import torch
from torch.testing import assert_close

from fp6_compile.kernels.selection import launch, selftest
from fp6_compile.kernels.selection.choices import choices
from fp6_compile.kernels.triton import run
from fp6_compile.kernels.triton.config import Config
from fp6_compile.layouts.packing import gpu_layout, pack
from tests.support.kernels import (
    BF16,
    BUCKETS,
    E2M3,
    E3M2,
    F16,
    F32,
    GEMM,
    ONE_HOT,
    OTHER_FORMATS,
    SPLIT,
    activations,
    check_codes,
    check_gemm,
    check_one_hot,
    nan_around,
    product,
    show,
)
from tests.support.references import SIX_BITS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=show)
@pytest.mark.parametrize("fmt", [*SIX_BITS.values(), *OTHER_FORMATS], ids=show)
def test_codes(fmt, dtype):
    """First of all: the subnormal FP16 weights that the tensor cores must not flush, and BF16's exact bias shift."""
    check_codes(_eight_rows_at_a_time, "cuda", fmt, dtype)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
@pytest.mark.parametrize("fmt", SIX_BITS.values(), ids=SIX_BITS)
def test_codes_of_a_wide_tile(fmt, dtype):
    check_codes(launch.mm, "cuda", fmt, dtype)


def _eight_rows_at_a_time(x, *weight):
    """By the tiles for decoding, whatever is taken for many rows."""
    return torch.cat([launch.mm(rows, *weight) for rows in x.split(8)])


@pytest.mark.parametrize(("m", "n", "k", "group", "fmt", "dtype"), ONE_HOT, ids=show)
def test_one_hot(m, n, k, group, fmt, dtype):
    check_one_hot(launch.mm, "cuda", m, n, k, group, fmt, dtype)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
@pytest.mark.parametrize("fmt", SIX_BITS.values(), ids=SIX_BITS)
@pytest.mark.parametrize("m", BUCKETS)
def test_integers_are_exact(m, fmt, dtype):
    """x in -1, 0, 1: every partial sum is a multiple of 1/16 below 2^17, so float32 holds it in any order. A race between
    unpacking and the tensor cores, which random data could hide in its tolerance, cannot hide here."""
    n, k = 768, 4096
    codes = torch.randint(0, 64, (n, k), dtype=torch.uint8)
    x = torch.randint(-1, 2, (m, k)).to("cuda", dtype)
    exact = x.cpu().double() @ fmt.decode(codes).double().T
    for _ in range(20):
        assert_close(product(launch.mm, x, codes, torch.ones(1, n), fmt, None), exact.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(("m", "n", "k", "group", "fmt", "dtype"), GEMM, ids=show)
def test_gemm(m, n, k, group, fmt, dtype):
    check_gemm(launch.mm, activations(m, k, dtype, "cuda"), n, group, fmt)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
@pytest.mark.parametrize("m", BUCKETS)
def test_gemm_of_a_layer(m, dtype, group):
    check_gemm(launch.mm, activations(m, 4096, dtype, "cuda"), 1536, group, E3M2)


@pytest.mark.parametrize("group", [None, 32])
def test_nothing_outside_x_is_used(group):
    check_gemm(launch.mm, nan_around(activations(9, 257, F16, "cuda")), 40, group, E2M3)


def test_more_than_two_to_the_31_elements():
    """x past the reach of 32-bit offsets: its last row is read wrongly if any offset wraps."""
    m, k = 2**18 + 3, 2**13
    x = torch.zeros(m, k, dtype=F16, device="cuda")
    x[-1] = 1
    codes = torch.randint(0, 64, (16, k), dtype=torch.uint8)
    tile = functools.partial(run.run, Config(32, 64, 2, 2))
    out = product(tile, x, codes, torch.full((1, 16), 2.0**-8), E3M2, None)
    exact = E3M2.decode(codes).double().sum(1) * 2.0**-8
    assert_close(out[-1], exact.to(F16), rtol=0, atol=0)
    assert not out[:-1].any()


@pytest.mark.parametrize(("tile", "m", "n", "k", "group", "fmt", "dtype", "parts"), SPLIT, ids=show)
def test_split(tile, m, n, k, group, fmt, dtype, parts):
    on_device = functools.partial(run.run, dataclasses.replace(tile, SPLIT_K=parts))
    check_gemm(on_device, activations(m, k, dtype, "cuda"), n, group, fmt)
    check_one_hot(on_device, "cuda", m, n, k, group, fmt, dtype)


def test_split_is_deterministic_and_leaves_no_trace():
    """Hundreds of programs race to be the last; every run gives the same bits, and the locks are zeros again."""
    codes, x = torch.randint(0, 64, (4096, 4096), dtype=torch.uint8), activations(3, 4096, F16, "cuda")
    planes = [plane.cuda() for plane in pack(codes, E3M2, gpu_layout(F16))]
    arguments = (x, planes, torch.rand(1, 4096, device="cuda"), E3M2, None)
    assert choices(x.device, 3, 4096, 4096, None, F16, E3M2)[0].SPLIT_K > 1
    first = launch.mm(*arguments)
    for _ in range(100):
        assert torch.equal(launch.mm(*arguments), first)
    assert not run._locks(x.device, 1).any()


def test_split_inside_cuda_graphs_beside_each_other():
    """Two recorded launches replayed on two streams at once do not share locks."""
    codes = torch.randint(0, 64, (2048, 4096), dtype=torch.uint8)
    planes = [plane.cuda() for plane in pack(codes, E3M2, gpu_layout(F16))]
    x = [activations(m, 4096, F16, "cuda") for m in (2, 5)]
    arguments = [(each, planes, torch.ones(1, 2048, device="cuda"), E3M2, None) for each in x]
    expected = [launch.mm(*each) for each in arguments]
    graphs = [torch.cuda.CUDAGraph() for _ in x]
    outputs = []
    for graph, each in zip(graphs, arguments, strict=True):
        with torch.cuda.graph(graph):
            outputs.append(launch.mm(*each))
    streams = [torch.cuda.Stream() for _ in x]
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for output, exact in zip(outputs, expected, strict=True):
        assert torch.equal(output, exact)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
def test_wgmma_passes_its_self_test(dtype, group):
    """If this fails, the kernel still is right (it does without wgmma), but slower above 64 rows: report the versions."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is Hopper's")
    assert selftest._is_exact(torch.device("cuda"), dtype, E3M2, group)


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
@pytest.mark.parametrize("m", [65, 128, 300, 1500])
def test_many_rows(m, dtype, group):
    """Whatever is taken for it: wgmma, mma.sync, or ATen's matmul on a dequantized copy."""
    check_gemm(launch.mm, activations(m, 2048, dtype, "cuda"), 1000, group, E2M3)


def test_every_candidate():
    """What max-autotune may choose, and the tuner: right in every one of them."""
    for m in (1, 16, 40, 128):
        for tile in filter(None, choices(torch.device("cuda"), m, 1024, 4096, None, F16, E3M2)):
            check_gemm(functools.partial(run.run, tile), activations(m, 4096, F16, "cuda"), 1024, None, E3M2)


def test_launches_on_the_device_of_x():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    check_gemm(launch.mm, activations(4, 256, F16, "cuda:1"), 32, None, E3M2)
