"""The three checks of a matrix kernel: all codes, one-hot activations, random ones against float64.

`check_*` take the function that runs the kernel and a device: interpreted on the CPU, or on a GPU.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from fp6_compile.formats import FORMATS, Format
from fp6_compile.kernels.selection import launch
from fp6_compile.kernels.selection.choices import choices
from fp6_compile.kernels.triton.config import Config
from fp6_compile.layouts.packing import gpu_layout, pack
from fp6_compile.quantize import dequantize
from tests.deviceless.pool import interpreted

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

ONE_HOT = [
    (m, n, k, group, fmt, dtype)
    for i, (m, (n, k)) in enumerate(zip(BUCKETS, [(17, 40), (40, 257), (130, 400), (64, 512)] * 2, strict=True))
    for group in ((None, 32, 96, 512)[i % 4], (64, 128, 256, None)[i % 4])
    for fmt, dtype in ([(E3M2, F16), (E2M3, BF16)] if i % 2 else [(E3M2, BF16), (E2M3, F16)])
] + [(9, 40, 257, 32, E3M2, F32), (8, 17, 400, None, E2M3, F32)]

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

TILE = Config(32, 8, 2, 2)
# (tile, m, n, k, group, format, dtype); K in blocks of 256: parts of equal length, a shorter last one, a block's tail.
SPLIT = [
    (TILE, 1, 33, 1024, None, E3M2, F16, 2),
    (TILE, 9, 40, 1100, None, E2M3, BF16, 3),
    (TILE, 3, 17, 1536, 64, E3M2, BF16, 6),
    (TILE, 8, 70, 1280, 384, E2M3, F16, 3),
    (dataclasses.replace(TILE, BLOCK_M=32), 33, 40, 700, 32, E3M2, F16, 2),
]


def nan_around(x: Tensor) -> Tensor:
    """x as a view into NaN: behind every row, and behind the last one."""
    wide = torch.full((x.shape[0] + 64, x.shape[1] + 512), torch.nan, dtype=x.dtype, device=x.device)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide[: x.shape[0], : x.shape[1]]
