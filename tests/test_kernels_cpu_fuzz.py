"""Random calls of the C++ kernel against float64, CASES on each path, and in canonical planes: the derived bound holds.

The bound is `_bound`; where float32 can hold the sum of the magnitudes, with scales and without, a result is NaN or infinite
only if the exact one is, or rounds to it. Every case comes from its seed: `_case(path, 123)` is that case again.
"""

import math
import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fp6_compile import ops
from fp6_compile.formats import FORMATS, Format
from fp6_compile.layouts.packing import CPU, PLANES, pack
from tests.support.soak import count

CASES = count(500, 100)
FLUSHING = ("avx512_bf16", "amx")  # vdpbf16ps and tdpbf16ps take subnormal numbers for zeros
SUPPORTED = torch.ops.fp6.cpu_paths() if ops.load() else []

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SUPPORTED, reason="no C++ compiler")]


class Case(NamedTuple):
    """A call and what it is held to."""

    x: Tensor  # [*, K], any strides
    codes: Tensor  # [N, K]
    scale: Tensor  # [groups, N]
    fmt: Format
    group_size: int | None
    blocks: bool
    threads: int

    def __str__(self) -> str:
        x, shape = self.x, tuple(self.codes.shape)
        return f"x {x.dtype} {tuple(x.shape)} of strides {x.stride()}, {self.fmt.name} {shape}, {self[4:]}"

    def by_column(self) -> Tensor:
        """The scale of each weight, [N, K] in float64."""
        k = self.codes.shape[1]
        return self.scale.double().T.repeat_interleave(min(self.group_size or k, k) or 1, 1)[:, :k]


def _case(path: str, seed: int) -> Case:
    pick = random.Random(f"{path} {seed}")
    make = torch.Generator().manual_seed(pick.getrandbits(48))
    planes = path == PLANES
    fmt = pick.choice([fmt for fmt in FORMATS.values() if planes or fmt.bits == 6])
    m = pick.choice([0, 1, 1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 33, 64, 127, 250])
    n, k = (
        pick.choice([0, 1, 2, 3, 4, 5, 31, 64, 101, 263]),
        pick.choice([0, 1, 2, 3, 31, 32, 63, 64, 65, 257, 509, 640, 1021]),
    )
    if seed % 25 == 0:  # beyond what is decoded at a time
        n, k, m = pick.choice([(4099, 640, 3), (2063, 1021, 9), (70, 33013, 2)])
    blocks = planes or pick.random() < 0.5
    sizes = [None, 32, 64, 96, 128, 4096, *([1, 3, 7, 33, 100] if blocks else [])]
    group_size = pick.choice(sizes)
    special = pick.choice(["none"] * 6 + ["codes", "scales", "activations"])

    codes = torch.randint(0, 2**fmt.bits, (n, k), dtype=torch.uint8, generator=make)
    if special != "codes":  # those that stand for no number
        codes[~fmt.values()[codes.int()].isfinite()] = 1
    groups = 1 if group_size is None else -(-k // group_size)
    kind = pick.choice(["ordinary", "ordinary", "huge", "tiny", "mixed"])
    powers = {"ordinary": (-3, 1), "huge": (29, 30), "tiny": (-32, -28), "mixed": (-9, 9)}[kind]
    scale = 10.0 ** (torch.rand(groups, n, generator=make) * (powers[1] - powers[0]) + powers[0])
    if special == "scales" and n:
        scale[:, pick.randrange(n)] = pick.choice([math.nan, math.inf])

    dtype = pick.choice([torch.float16, torch.bfloat16, torch.float32])
    x = _activations(pick, make, m, k, dtype, special == "activations")
    return Case(x, codes, scale, fmt, group_size, blocks, pick.choice([1, 2]))


def _activations(
    pick: random.Random, make: torch.Generator, m: int, k: int, dtype: torch.dtype, special: bool
) -> Tensor:
    size = pick.choice([1.0, 1.0, 1e-3, 100.0, torch.finfo(dtype).smallest_normal])
    x = (torch.randn(m, 2 * k, generator=make) * size).to(dtype)
    if special and x.numel():
        for _ in range(3):
            x[pick.randrange(m), pick.randrange(2 * k)] = pick.choice([math.inf, -math.inf, math.nan])
    return {
        "contiguous": lambda: x[:, :k].contiguous(),
        "rows apart": lambda: x[:, :k],
        "inputs apart": lambda: x[:, ::2],
        "transposed": lambda: x[:, :k].T.contiguous().T,
        "one row": lambda: x[:1, :k].expand(m, k),
        "one input": lambda: x[:, :1].expand(m, k) if k else x,
        "three dimensions": lambda: x[:, :k].expand(2, m, k),
    }[
        pick.choice(
            ["contiguous"] * 3
            + ["rows apart", "inputs apart", "transposed", "one row", "one input", "three dimensions"]
        )
    ]()


def _call(path: str, case: Case) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        if path == PLANES:
            planes = pack(case.codes, case.fmt, PLANES)
            return torch.ops.fp6.mm(case.x, planes, case.scale, case.fmt.name, PLANES, case.group_size)
        planes = pack(case.codes, case.fmt, CPU)
        return torch.ops.fp6.cpu_mm(case.x, planes, case.scale, case.fmt.name, case.group_size, path, case.blocks)
    finally:
        torch.set_num_threads(before)


def _bound(path: str, case: Case, expected: Tensor, magnitude: Tensor) -> Tensor:
    """Of the error, with u = 2^-24: the result's rounding, one per product, sum and scale in float32; the weights' rounding
    to x's dtype where they are decoded to it; and what underflows."""
    k, info, flushing = case.codes.shape[1], torch.finfo(case.x.dtype), path in FLUSHING
    roundings = k + case.scale.shape[0] + 4
    bound = info.eps * expected.abs() + info.smallest_normal * info.eps + roundings * 2.0**-24 * magnitude
    sizes = case.x.reshape(-1, k).double().abs().sum(1, keepdim=True) if k else expected * 0
    folded = path == "amx" and case.x.dtype == torch.bfloat16 and case.group_size and case.group_size % 64 == 0
    if case.blocks or folded:
        bound += info.eps * magnitude + sizes * (2.0**-24 if case.x.dtype == torch.float16 else 2.0**-126)
    tiny = 2.0**-126 if flushing else 2.0**-149
    underflows = max(case.fmt.max, 1.0) * case.by_column().sum(1) + case.scale.shape[0] + case.blocks * k
    return bound + 4 * tiny * underflows


def _ratio(path: str, seed: int) -> float:
    """The largest error of a case as a share of its bound; fails on a result that is not finite, or is, and must not be."""
    case = _case(path, seed)
    out = _call(path, case)
    assert out.dtype == case.x.dtype
    assert out.shape == (*case.x.shape[:-1], case.codes.shape[0])
    n, k = case.codes.shape
    if out.numel() == 0 or k == 0:
        assert (out == 0).all()
        return 0.0
    values, out = case.fmt.values().double()[case.codes.int()], out.reshape(-1, n).double()
    x, weight = case.x.reshape(-1, k).double(), values * case.by_column()
    expected, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    assert (~out[~expected.isfinite()].isfinite()).all(), "finite where the exact result is not"
    if case.scale.isfinite().all():  # else infinity or NaN: a scale multiplies sums, or weights
        torch.testing.assert_close(
            out[~expected.isfinite()], expected[~expected.isfinite()], rtol=0, atol=0, equal_nan=True
        )
    held = 1e38  # well within float32, and so no partial sum leaves it
    safe = (magnitude < held) & (x.abs() @ values.abs().T < held)
    bound = _bound(path, case, expected, magnitude)
    # A result that rounds to infinity is one.
    most = torch.finfo(case.x.dtype).max
    rounds_away = safe & out.isinf() & (out.sign() == expected.sign()) & (expected.abs() + bound > most)
    judged = safe & ~rounds_away
    error = (out - expected).abs()[judged] / bound[judged]
    assert not error.isnan().any(), "NaN where the exact result is a number"
    return float(error.max()) if error.numel() else 0.0


@pytest.mark.parametrize("path", [*SUPPORTED, PLANES])
def test_random_calls(path):
    ratios = {}
    for seed in range(CASES):
        try:
            ratios[seed] = _ratio(path, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {_case(path, seed)}") from error
    worst = max(ratios, key=ratios.__getitem__)
    print(f"{path}: {CASES} cases, largest error {ratios[worst]:.2f} of its bound, in case {worst}")
    assert ratios[worst] <= 1, f"seed {worst}: {_case(path, worst)}"
