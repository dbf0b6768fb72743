"""The matmuls that `benchmarks.cpu` times: ours, F.linear, and torch's own weight-only int8 and int4 for CPUs.

A provider has copies of one weight [n, k], together larger than a cache, and each call reads the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fp6_compile.ops  # noqa: F401  (defines torch.ops.fp6)

aten = torch.ops.aten


@dataclass
class Provider:
    """`call(x)` multiplies by the next copy; a copy has `nbytes`."""

    name: str
    call: Callable[[Tensor], Tensor]
    nbytes: int


def providers(n: int, k: int, group_size: int | None, dtype: torch.dtype, megabytes: int) -> Iterator[Provider]:
    """All providers for activations of `dtype`, ours and F.linear first."""
    yield _fp6(n, k, group_size, megabytes)
    yield _provider("linear", lambda x, w: F.linear(x, w), (torch.randn(n, k).to(dtype),), megabytes)
    # Slower than seconds a call in FP32 and FP16 for large batches, and made for BF16.
    if dtype == torch.bfloat16 and hasattr(aten, "_weight_int8pack_mm"):
        yield _provider(
            "int8",
            lambda x, w, scale: aten._weight_int8pack_mm(x, w, scale),
            (torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n).to(dtype)),
            megabytes,
        )
    if dtype == torch.bfloat16 and hasattr(aten, "_weight_int4pack_mm_for_cpu"):
        group = group_size if group_size in (32, 64, 128, 256) else 128
        packed = aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
        yield _provider(
            f"int4 g{group}",
            lambda x, w, scales: aten._weight_int4pack_mm_for_cpu(x, w, group, scales),
            (packed, torch.rand(k // group, n, 2).to(dtype)),
            megabytes,
        )


def _fp6(n: int, k: int, group_size: int | None, megabytes: int) -> Provider:
    """Random bytes are codes of some weight."""
    w4, w2 = (torch.randint(0, 256, (n // 4, k // 64, planes * 64), dtype=torch.uint8) for planes in (2, 1))
    weight = w4.unflatten(2, (2, 64)), w2, torch.rand(-(-k // group_size) if group_size else 1, n)
    op = torch.ops.fp6.mm.default
    return _provider(
        "fp6", lambda x, w4, w2, scale: op(x, [w4, w2], scale, "e3m2", "cpu.v1", group_size), weight, megabytes
    )


def _provider(name: str, multiply: Callable[..., Tensor], weight: tuple[Tensor, ...], megabytes: int) -> Provider:
    nbytes = sum(t.nbytes for t in weight)
    copies: Iterator[Any] = itertools.cycle(
        [tuple(t.clone() for t in weight) for _ in range(2 + megabytes * 1_000_000 // nbytes)]
    )
    return Provider(name, lambda x: multiply(x, *next(copies)), nbytes)
