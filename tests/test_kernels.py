"""The matrix kernel interpreted on the CPU, in three rings: all codes, one-hot activations, random against float64.

`check_*` take the function that runs the kernel and a device, so that test_kernels_gpu.py runs the same on a GPU.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fp6_compile.formats import FORMATS, Format
from fp6_compile.kernels.selection import launch
from fp6_compile.kernels.selection.choices import choices
from fp6_compile.kernels.triton import config, run
from fp6_compile.layouts.packing import gpu_layout, pack
from fp6_compile.quantize import dequantize
from tests.deviceless.pool import interpreted
from tests.support import SIX_BITS

E3M2, E2M3 = FORMATS["e3m2"], FORMATS["e2m3"]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Unit roundoff: 2^-p for p significant bits.
ROUNDOFF = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24}
BUCKETS = (1, 8, 9, 16, 17, 32, 33, 130)
Run = Callable[..., Tensor]


def show(value: object) -> str:
    """A short name in a test's id."""
    return value.name if isinstance(value, Format) else str(value).removeprefix("torch.")


def run_interpreted(*args) -> Tensor:
    return interpreted(launch.mm, *args)


def weight(n: int, k: int, group: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes [n, k], the first 64 of them all different, and scales [G, n] of no simple bits."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 64, (n, k), dtype=torch.uint8, generator=generator)
    codes.view(-1)[:64] = torch.arange(min(64, n * k))
    scale = torch.rand(-(-k // group) if group else 1, n, generator=generator) * 3e-2 + 1e-3
    return codes, scale


def product(run: Run, x: Tensor, codes: Tensor, scale: Tensor, fmt: Format, group: int | None) -> Tensor:
    planes = pack(codes, fmt, gpu_layout(x.dtype))
    return run(x, [plane.to(x.device) for plane in planes], scale.to(x.device), fmt, group).cpu()


def check_codes(run: Run, device: str, fmt: Format, dtype: torch.dtype) -> None:
    """Each of the codes at each of the 256 places of a block comes out as its value, exactly."""
    count = 2**fmt.bits
    codes = (torch.arange(count)[:, None] + torch.arange(256)).remainder(count).to(torch.uint8)
    if fmt.exponent_bits == 5:
        codes &= fmt.sign | fmt.max_code
    x = torch.eye(256, dtype=dtype, device=device)
    out = product(run, x, codes, torch.ones(1, count), fmt, None)
    assert_close(out, fmt.decode(codes).T.to(dtype), rtol=0, atol=0)


def check_one_hot(run: Run, device: str, m: int, n: int, k: int, group: int | None, fmt: Format, dtype) -> None:
    """The output is the dequantized weight to the last bit: its one product is exact in the accumulator, so the scale's
    float32 rounding and the rounding to `dtype` are the only ones, and `dequantize` does both."""
    codes, scale = weight(n, k, group)
    inputs = torch.randperm(k, generator=torch.Generator().manual_seed(m))[torch.arange(m) % k]
    x = torch.nn.functional.one_hot(inputs, k).to(device, dtype)
    expected = dequantize(codes, scale, fmt, group, dtype).T[inputs]
    assert_close(product(run, x, codes, scale, fmt, group), expected, rtol=0, atol=0)


def check_gemm(run: Run, x: Tensor, n: int, group: int | None, fmt: Format) -> None:
    """Against float64 of the dequantized weight.

    Products of x with a code are exact in float32 for 16-bit x, one rounding otherwise; summing k of them, with a scale
    per group, rounds each at most k + 2 times (Higham, theorem 3.5, any order); then one rounding to the dtype, or to
    its subnormal spacing. Tensor cores may truncate where float32 rounds: twice the unit roundoff 2^-24. The aten's
    matmul reads weights that have been rounded to the dtype.
    """
    m, k = x.shape
    codes, scale = weight(n, k, group, seed=n * k)
    w = dequantize(codes, scale.double(), fmt, group, torch.float64)
    exact = x.cpu().double() @ w.T
    unit = ROUNDOFF[x.dtype]
    by_aten = choices(x.device, m, n, k, group, x.dtype, fmt)[0] is None
    relative = (k + 2) * 2.0**-23 * (1 + unit) + unit * by_aten
    bound = relative * (x.cpu().double().abs() @ w.abs().T) + unit * exact.abs()
    error = (product(run, x, codes, scale, fmt, group).double() - exact).abs()
    assert bool((error <= bound + torch.finfo(x.dtype).smallest_normal * unit).all()), (error / bound).max()


def activations(m: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m * k)).to(device, dtype)


# Of every width that is not six bits, the named ones first.
OTHER_FORMATS = [FORMATS[name] for name in ("e2m2", "e3m1", "e2m1", "e4m3", "e3m3", "e5m2", "e1m1")]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=show)
@pytest.mark.parametrize("fmt", OTHER_FORMATS[:4], ids=show)
def test_codes_of_other_formats(fmt, dtype):
    check_codes(run_interpreted, "cpu", fmt, dtype)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=show)
@pytest.mark.parametrize("fmt", SIX_BITS.values(), ids=SIX_BITS)
def test_codes(fmt, dtype):
    check_codes(run_interpreted, "cpu", fmt, dtype)


ONE_HOT = [
    (m, n, k, group, fmt, dtype)
    for i, (m, (n, k)) in enumerate(zip(BUCKETS, [(17, 40), (40, 257), (257, 400), (64, 512)] * 2, strict=True))
    for group in ((None, 32, 96, 512)[i % 4], (64, 128, 256, None)[i % 4])
    for fmt, dtype in ([(E3M2, F16), (E2M3, BF16)] if i % 2 else [(E3M2, BF16), (E2M3, F16)])
] + [(9, 40, 257, 32, E3M2, F32), (8, 17, 400, None, E2M3, F32)]


@pytest.mark.parametrize(("m", "n", "k", "group", "fmt", "dtype"), ONE_HOT, ids=show)
def test_one_hot(m, n, k, group, fmt, dtype):
    check_one_hot(run_interpreted, "cpu", m, n, k, group, fmt, dtype)


GEMM = [
    (1, 17, 17, None, E3M2, F16),
    (7, 40, 257, 32, E3M2, BF16),
    (8, 257, 400, 64, E2M3, F16),
    (9, 17, 1024, 512, E3M2, F16),
    (16, 40, 600, 96, E2M3, BF16),
    (17, 130, 512, 128, E3M2, F16),
    (33, 40, 257, None, E2M3, F16),
    (65, 70, 512, 256, E3M2, BF16),
    (130, 64, 300, 384, E2M3, BF16),
    (2, 33, 1030, None, E3M2, BF16),
    (3, 33, 1030, 64, E2M3, F16),
    (64, 70, 300, 64, E3M2, F16),
    (128, 40, 257, None, E2M3, BF16),
    (300, 33, 270, 32, E3M2, F16),
    (7, 40, 257, 32, E3M2, F32),
    (17, 17, 512, None, E2M3, F32),
]


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


def nan_around(x: Tensor) -> Tensor:
    """x as a view into NaN: behind every row, and behind the last one."""
    wide = torch.full((x.shape[0] + 64, x.shape[1] + 512), torch.nan, dtype=x.dtype, device=x.device)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide[: x.shape[0], : x.shape[1]]


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
