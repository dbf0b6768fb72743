"""The matrix kernel interpreted on the CPU: all codes, one-hot activations, random ones against float64.

test_kernels_gpu.py runs the same checks (support/kernels.py) on a GPU.
"""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fp6_compile.kernels.selection import launch
from fp6_compile.kernels.triton import config, run
from fp6_compile.layouts.packing import gpu_layout, pack
from tests.deviceless.pool import interpreted
from tests.support.kernels import (
    BF16,
    BUCKETS,
    E3M2,
    F16,
    F32,
    GEMM,
    ONE_HOT,
    OTHER_FORMATS,
    activations,
    check_codes,
    check_gemm,
    check_one_hot,
    nan_around,
    product,
    run_interpreted,
    show,
)
from tests.support.references import SIX_BITS


@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
@pytest.mark.parametrize("fmt", OTHER_FORMATS[:4], ids=show)
def test_codes_of_other_formats(fmt, dtype):
    check_codes(run_interpreted, "cpu", fmt, dtype)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=show)
@pytest.mark.parametrize("fmt", SIX_BITS.values(), ids=SIX_BITS)
def test_codes(fmt, dtype):
    check_codes(run_interpreted, "cpu", fmt, dtype)


@pytest.mark.parametrize(("m", "n", "k", "group", "fmt", "dtype"), ONE_HOT, ids=show)
def test_one_hot(m, n, k, group, fmt, dtype):
    check_one_hot(run_interpreted, "cpu", m, n, k, group, fmt, dtype)


@pytest.mark.parametrize(("m", "n", "k", "group", "fmt", "dtype"), GEMM, ids=show)
def test_gemm(m, n, k, group, fmt, dtype):
    check_gemm(run_interpreted, activations(m, k, dtype), n, group, fmt)


STRIDED = {
    "rows of a wider tensor": lambda: activations(5, 600, F16)[:, 100:400],
    "every other row": lambda: activations(18, 300, F16)[::2],
    "transposed": lambda: activations(300, 9, F16).T,
    "every other input": lambda: activations(9, 600, F16)[:, ::2],
    "one row for all": lambda: activations(1, 300, F16).expand(9, 300),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strides(make):
    check_gemm(run_interpreted, make(), 40, None, E3M2)


def nan_around_product(x, planes, scale, fmt, group) -> Tensor:
    """The view is made where the kernel runs: pickling x would make it contiguous."""
    return launch.mm(nan_around(x), planes, scale, fmt, group)


@pytest.mark.parametrize("group", [None, 32])
def test_nothing_outside_x_is_used(group):
    def run(*args):
        return interpreted(nan_around_product, *args)

    check_gemm(run, activations(9, 257, F16), 40, group, E3M2)


@pytest.mark.parametrize(("m", "n"), [(0, 40), (5, 0)])
def test_nothing_to_compute(m, n):
    """No launch: this process does not interpret, and has no GPU to launch on."""
    planes = pack(torch.zeros(n, 64, dtype=torch.uint8), E3M2, gpu_layout(F16))
    assert launch.mm(torch.ones(m, 64, dtype=F16), planes, torch.ones(1, n), E3M2, None).shape == (m, n)


def test_overflow_is_the_result_s_not_the_kernel_s():
    """Sums past float16's range are fine until they are scaled: 2^12 is rescaled in float32."""
    codes = torch.full((16, 512), 31, dtype=torch.uint8)
    x = torch.full((1, 512), 100.0, dtype=F16)
    out = product(run_interpreted, x, codes, torch.full((1, 16), 2.0**-10), E3M2, None)
    assert_close(out, torch.full((1, 16), 28 * 512 * 100 * 2.0**-10, dtype=F16), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("group", "supported"), [(None, True), (32, True), (96, True), (48, False), (0, False), (-32, False)]
)
def test_supports(group, supported):
    reason = config.supports(group)
    assert (
        reason is None if supported else reason.startswith(f"group_size: got {group}, the GPU kernel needs a multiple")
    )


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=show)
@pytest.mark.parametrize("group", [None, 32, 64, 96, 128])
@pytest.mark.parametrize("m", [*BUCKETS, 10_000])
@pytest.mark.parametrize("n", [512, 1 << 16])
def test_configs_are_tiles_the_kernel_can_run(n, m, group, dtype):
    tile = next(tile for tile in config.candidates(m, n, 4096, group, dtype, config.Device("sm_90")) if tile)
    assert tile.BLOCK_N % 16 == 0
    assert min(m, 16 if dtype == F32 else 32) <= tile.BLOCK_M
    # What keeps Hopper and Blackwell on mma.sync (test_kernels_machine.py); float32 has no tensor core to choose.
    assert dtype == F32 or tile.num_warps <= 2


def test_constants_can_be_printed_into_a_template():
    constants = config.constexprs(config.config_for(1, 64, 64), E3M2, None, 400, True)
    assert all(type(value) in (int, bool) for value in constants.values())
    assert constants["GROUP_SIZE"] == 0
    assert not constants["EVEN_K"]


def test_assembly_only_on_nvidia():
    assert run.uses_asm("cuda") == (torch.version.hip is None)
    assert not run.uses_asm("cpu")
    assert not run.uses_asm("xpu")
    assert not interpreted(run.uses_asm, "cuda")
