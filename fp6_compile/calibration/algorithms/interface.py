"""What an algorithm is, and what it returns.

An algorithm is a callable object: a weight, a grid of numbers, a group size and, if there are any, statistics of the layer's
inputs go in; codes and scales come out. Algorithms nest: GPTQ(Clip()) rounds by GPTQ on the scales that Clip finds.

Every algorithm works without statistics too, as well as it can: that is what a layer gets that calibration never reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.quantize import Grid, dequantize

_ROWS = 1024  # outputs worked on together: what bounds the memory of a large head


class Needs(IntEnum):
    """What an algorithm wants to know of a layer's inputs; each level has those below."""

    NOTHING = 0
    MOMENTS = 1
    HESSIAN = 2


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K] in codes.

    `grid` and `group_size` say how to read `codes` [N, K] (uint8) and `scale` [G, N] (float32). Extras: `offset` [G, N] is
    added to every weight of its group (evaluation only: no kernel reads it); `low_rank` are A [K, r] and B [r, N], and the
    layer computes x @ W^T + (x @ A) @ B; `shift` [N] (float32) is added to the layer's bias.
    """

    grid: Grid
    group_size: int | None
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    shift: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What codes, scales and offsets stand for, without the low-rank part."""
        weight = dequantize(self.codes, self.scale, self.grid, self.group_size, torch.float32)
        if self.offset is not None:
            weight += per_weight(self.offset, self.group_size, weight.shape[1])
        return weight.to(dtype)

    def effective(self) -> Tensor:
        """The float32 weight that the layer multiplies by, low-rank part included."""
        weight = self.dequantize()
        return weight if self.low_rank is None else weight + (self.low_rank[0].float() @ self.low_rank[1].float()).T

    def rows(self, rows: slice) -> Quantized:
        """Codes, scales and offsets of some rows; without the other extras."""
        offset = None if self.offset is None else self.offset[:, rows]
        return Quantized(self.grid, self.group_size, self.codes[rows], self.scale[:, rows], offset)

    @property
    def bytes(self) -> int:
        """Bytes of codes (as if packed), scales and extras."""
        extras = [self.offset, self.shift, *(self.low_rank or ())]
        return -(-self.codes.numel() * self.grid.bits // 8) + sum(
            t.nbytes for t in (self.scale, *extras) if t is not None
        )


class Algorithm(Protocol):
    """From a weight to codes. `repr` tells algorithms apart: frozen dataclasses are best."""

    @property
    def needs(self) -> Needs:
        """What it asks of `stats`."""

    def __call__(self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None) -> Quantized:
        """`weight` [N, K], floating point and finite. Raises ValueError as quantize.quantize does."""


def per_weight(values: Tensor, group_size: int | None, k: int) -> Tensor:
    """[G, N] spread over the inputs of each group: [N, K], or [N, 1] for one group."""
    return values.T if values.shape[0] <= 1 else values.T.repeat_interleave(group_size or k, 1)[:, :k]


def output_error(weight: Tensor, approximation: Tensor, stats: Statistics | None) -> Tensor:
    """Of each row of [N, K]: the mean squared error of its output over the calibration set, or what is known of it.

    Without statistics, the squared error of the weights.
    """
    error = approximation - weight
    return error.square().sum(1) if stats is None else stats.mean_square(error)


def better_rows(weight: Tensor, start: Quantized, other: Quantized, stats: Statistics) -> Quantized:
    """`start`, with the codes of `other` in the rows where those have less output error; both have the same scales."""
    codes = start.codes.clone()
    for rows in row_blocks(len(weight)):
        w = weight[rows].float()
        before, after = (output_error(w, q.rows(rows).dequantize(), stats) for q in (start, other))
        codes[rows] = torch.where((after < before)[:, None], other.codes[rows], codes[rows])
    return replace(start, codes=codes)


def row_blocks(n: int) -> Iterator[slice]:
    """Slices of n rows, few enough to work on in float32."""
    return (slice(i, i + _ROWS) for i in range(0, n, _ROWS))
