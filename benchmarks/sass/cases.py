"""The problems that the kernel is compiled for, and compiling it for one of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.sass.machine import Compiled, compile_kernel
from fp6_compile.formats import Format, get_format
from fp6_compile.kernels.triton.config import LARGEST_MMA_M, Config, Device, config_for, constexprs
from fp6_compile.kernels.triton.mm import mm_kernel
from fp6_compile.kernels.triton.run import three
from fp6_compile.layouts.gpu_tiles import BLOCK_K

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WIDE, NARROW = (
    1 << 16,
    1 << 10,
)  # rows of a weight that fill a GPU with wide tiles, and that do not even when K is split
SPLIT = 1 << 12  # and that do then
# Multiprocessors of a GPU of each kind: they decide whether K is split.
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}


@dataclass(frozen=True)
class Case:
    """x [m, k] of `dtype` times a weight [n, k] in `format`, on `target` ("sm_90", "gfx942", ...)."""

    target: str
    m: int
    n: int
    format: str
    dtype: str
    group_size: int | None = None
    k: int = 4096

    @property
    def name(self) -> str:
        """The key of the case in the budget."""
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.target} m{self.m} n{self.n} k{self.k} {self.format} {self.dtype}{group}"


def _cases() -> list[Case]:
    """On sm_90 every tile, with the cheapest and the dearest unpacking; elsewhere some of them."""
    kinds = [("e3m2", "fp16"), ("e2m3", "bf16"), ("e3m2", "bf16"), ("e2m3", "fp16")]
    buckets, sizes = (8, 16, 32, 64), (WIDE, NARROW)
    cases = [Case("sm_90", m, n, *kind) for m in buckets for n in sizes for kind in kinds[:2]]
    cases += [Case("sm_90", m, WIDE, *kind) for m in buckets for kind in kinds[2:]]
    cases += [Case("sm_90", m, NARROW, "e3m2", "bf16") for m in (8, 16)]
    cases += [Case("sm_90", m, SPLIT, *kind) for m in (8, 16) for kind in kinds]
    cases += [Case("sm_90", m, n, "e2m3", "bf16", 64) for m in (8, 16, 32) for n in sizes]
    cases += [Case("sm_90", m, WIDE, "e2m3", "bf16", 32) for m in (8, 16, 32)]
    for target in ("sm_80", "sm_89", "sm_100", "sm_120"):
        cases += [Case(target, m, WIDE, "e3m2", "fp16") for m in (8, 16, 64)]
    cases += [Case("sm_90", 128, WIDE, *kind) for kind in kinds]
    cases += [Case("sm_90", 128, WIDE, *kind, 64) for kind in kinds[:2]]
    for target in ("sm_80", "sm_89", "sm_100", "sm_120"):
        cases += [Case(target, 128, WIDE, "e3m2", "fp16")]
    for target in ("sm_80", "sm_100", "sm_120"):
        cases += [Case(target, m, NARROW, "e2m3", "bf16") for m in (16, 64)]
    cases += [Case(target, 64, WIDE, "e2m3", "bf16", g) for target in ("sm_80", "sm_100") for g in (32, 64)]
    return cases + [Case("gfx942", m, WIDE, "e3m2", dtype) for m in (16, 32) for dtype in ("fp16", "bf16")]


CASES = _cases()


@dataclass(frozen=True)
class Kernel:
    """A compiled case: its tile, its code, and the weights that one thread unpacks in an iteration of the hot loop."""

    tile: Config
    code: Compiled
    weights: int

    def per_weight(self, count: int) -> float:
        """`count` instructions of the hot loop, over the weights of an iteration."""
        return count / self.weights


def tile_of(case: Case) -> Config | None:
    """The tile that the launcher would choose, on a Hopper whose self-test of wgmma has passed; None: ATen's matmul.

    Raises ValueError for an unknown target.
    """
    if case.target not in MULTIPROCESSORS:
        raise ValueError(f"unknown target {case.target!r}; known: {', '.join(MULTIPROCESSORS)}")
    device = Device(case.target, MULTIPROCESSORS[case.target], wgmma=case.target == "sm_90" and case.m > LARGEST_MMA_M)
    return config_for(case.m, case.n, case.k, case.group_size, DTYPES[case.dtype], device)


def _planes(fmt: Format) -> dict[str, str | None]:
    """Types of the three pointers to planes, None for one that the format lacks."""
    types = ["*u8" if width == 1 else "*i16" for width in fmt.planes]
    return dict(zip(("W0", "W1", "W2"), three(types), strict=True))


@functools.cache
def compile_case(case: Case) -> Kernel:
    """The eager kernel for `case`, compiled with no GPU.

    Raises ValueError for an unknown target or format, and where the launcher would take ATen's matmul.
    """
    nvidia, tile = case.target.startswith("sm"), tile_of(case)
    if tile is None:
        raise ValueError(f"{case.name}: ATen's matmul, no kernel of ours")
    constants: dict[str, Any] = constexprs(tile, get_format(case.format), case.group_size, case.k, use_asm=nvidia)
    x, planes = f"*{case.dtype}", _planes(get_format(case.format))
    constants |= {name: None for name, of in planes.items() if of is None}
    types = {"X": x, "SCALE": "*fp32", "OUT": x, "PARTS": "*fp32", "LOCKS": "*i32"}
    types |= {name: of for name, of in planes.items() if of is not None}
    types |= dict.fromkeys(("M", "N", "K", "stride_xm"), "i32")
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    aligned = [name for name in types if name != "M"]
    code = compile_kernel(mm_kernel, types, constants, case.target, divisible_by_16=aligned, **options)
    threads = tile.num_warps * (32 if nvidia else 64)
    return Kernel(tile, code, tile.BLOCK_N * BLOCK_K // threads)
