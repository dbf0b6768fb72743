"""What an algorithm gets and returns, and the simplest one: RTN, round to nearest.

An algorithm is called with a weight, a format (or another grid of numbers), a group size and statistics of the layer's
inputs; it returns codes and scales. A `Refinement` starts from the result of another algorithm, its `base`: GPTQ(Clip())
chooses codes by GPTQ on the scales that Clip finds.

Every algorithm also works without statistics, as well as it can: `calibrate_` has none for a layer that the model never
calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor

from fp6_compile.calibration.algorithms.statistics import Statistics
from fp6_compile.formats import FORMATS
from fp6_compile.quantize import Grid, dequantize, quantize

_ROWS = 1024  # rows of a weight worked on at once, so that temporaries of a large head stay small


class Needs(IntEnum):
    """The statistics that an algorithm uses; each level includes those before it."""

    NOTHING = 0
    MOMENTS = 1
    HESSIAN = 2


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K] as codes and scales.

    grid, group_size: how to read codes and scale. codes: [N, K] uint8. scale: [G, N] float32.
    low_rank: A [K, r] and B [r, N], for a layer that computes x @ W^T + (x @ A) @ B. shift: [N] float32, which is added to
    the layer's bias.
    """

    grid: Grid
    group_size: int | None
    codes: Tensor
    scale: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None
    shift: Tensor | None = None

    @property
    def packable(self) -> bool:
        """Whether a PackedTensor holds it: the grid is one of the package's formats."""
        return FORMATS.get(self.grid.name) == self.grid

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that codes and scales stand for, without the low-rank factors."""
        return dequantize(self.codes, self.scale, self.grid, self.group_size, torch.float32).to(dtype)

    def effective(self) -> Tensor:
        """The float32 weight [N, K] that the layer multiplies by, low-rank factors included."""
        weight = self.dequantize()
        return weight if self.low_rank is None else weight + (self.low_rank[0].float() @ self.low_rank[1].float()).T

    def rows(self, rows: slice) -> Quantized:
        """Codes and scales of some rows, without low-rank factors and bias."""
        return Quantized(self.grid, self.group_size, self.codes[rows], self.scale[:, rows])

    @property
    def bytes(self) -> int:
        """Bytes of codes (as if packed), scales, low-rank factors and bias."""
        others = [self.scale, self.shift, *(self.low_rank or ())]
        return -(-self.codes.numel() * self.grid.bits // 8) + sum(t.nbytes for t in others if t is not None)


class Algorithm(ABC):
    """From a weight to codes and scales.

    Subclasses are frozen dataclasses: `calibrate_(resume=...)` tells algorithms apart by their repr.
    """

    @property
    def needs(self) -> Needs:
        """The statistics that it uses: those of `base`, if it runs another algorithm."""
        base = getattr(self, "base", None)
        return Needs.NOTHING if base is None else base.needs

    @abstractmethod
    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        """Quantize one weight.

        Args:
            weight: [N, K], floating point, finite.
            grid: the format; or any grid of numbers, whose dequantized weights `calibrate_` puts into the model.
            group_size: inputs that share a scale, or None for the whole row.
            stats: of the layer's inputs, at least as `needs` says; None where there are none.

        Raises ValueError as `quantize.quantize` does.
        """


@dataclass(frozen=True)
class RTN(Algorithm):
    """Round to nearest, as ZeroQuant(4+2) does (arXiv 2312.08583, section 3).

    The largest magnitude of each group becomes the grid's largest number, and every weight gets the nearest code.
    """

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        return Quantized(grid, group_size, *quantize(weight, grid, group_size))


@dataclass(frozen=True)
class Refinement(Algorithm):
    """An algorithm that improves on the result of another one, `base`."""

    base: Algorithm = field(default_factory=RTN)

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        return self.refine(weight, self.base(weight, grid, group_size, stats), stats)

    @abstractmethod
    def refine(self, weight: Tensor, start: Quantized, stats: Statistics | None) -> Quantized:
        """A better result for `weight` than `start`, which `base` found; `start` itself where it needs statistics."""


def per_weight(values: Tensor, group_size: int | None, k: int) -> Tensor:
    """Values of groups [G, N], such as scales, repeated for each input: [N, K], or [N, 1] for one group."""
    return values.T if values.shape[0] <= 1 else values.T.repeat_interleave(group_size or k, 1)[:, :k]


def output_error(weight: Tensor, approximation: Tensor, stats: Statistics | None) -> Tensor:
    """The mean squared error of each of the layer's N outputs on the calibration inputs, [N], for weights [N, K].

    Without statistics, the squared error of each row of the weight.
    """
    error = approximation - weight
    return error.square().sum(1) if stats is None else stats.mean_square(error)


def better_rows(weight: Tensor, start: Quantized, codes: Tensor, stats: Statistics) -> Quantized:
    """`start`, with other `codes` [N, K] in the rows where they have the smaller output error; the scales are the same."""
    kept, other = start.codes.clone(), replace(start, codes=codes)
    for rows in row_blocks(len(weight)):
        w = weight[rows].float()
        before, after = (output_error(w, q.rows(rows).dequantize(), stats) for q in (start, other))
        kept[rows] = torch.where((after < before)[:, None], codes[rows], kept[rows])
    return replace(start, codes=kept)


def row_blocks(n: int) -> Iterator[slice]:
    """Slices of n rows, few enough to work on in float32."""
    return (slice(i, i + _ROWS) for i in range(0, n, _ROWS))
