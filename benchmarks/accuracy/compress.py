"""One row's weights: every linear of a model is quantized as a setting says, for as long as the model is measured.

`calibrate_` does it, block by block, as it does for a user; but it puts dequantized float32 weights into the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.settings import FORMATS, MIXED, Setting
from fp6_compile.calibration import calibrate_
from fp6_compile.calibration.algorithms import Algorithm, Needs, Quantized, Statistics
from fp6_compile.packed.budget import choose_formats
from fp6_compile.quantize import Grid, sqnr


@dataclass
class Recorded(Algorithm):
    """Runs `algorithm` on 16-bit weights and records the size of the result and its error, by layer."""

    algorithm: Algorithm
    names: dict[int, str]  # by the address of the weight
    grids: dict[str, Grid] = field(default_factory=dict)  # of layers that have another grid than the setting's
    stored_bits: int = 0
    weights: int = 0
    sqnr: dict[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """Those of the algorithm."""
        return self.algorithm.needs

    def __call__(
        self, weight: Tensor, grid: Grid, group_size: int | None, stats: Statistics | None = None
    ) -> Quantized:
        name = self.names[weight.data_ptr()]
        found = self.algorithm(weight.half(), self.grids.get(name, grid), group_size, stats)
        whole = found.effective()
        self.add(name, weight, whole, 8 * found.bytes)
        return Effective(found.grid, None, found.codes, found.scale, shift=found.shift, weight=whole)

    def add(self, name: str, weight: Tensor, approximation: Tensor, bits: int) -> None:
        """Record a layer."""
        self.sqnr[name] = round(sqnr(weight, approximation), 2)
        self.stored_bits += bits
        self.weights += weight.numel()


@dataclass(frozen=True)
class Effective(Quantized):
    """A result as an ordinary weight, low-rank factors included, which is what `calibrate_` then puts into the layer."""

    weight: Tensor = field(kw_only=True)

    @property
    def packable(self) -> bool:
        """No: the study measures dequantized weights."""
        return False

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight."""
        return self.weight.to(dtype)


def _round_to_half(linears: dict[str, nn.Linear], books: Recorded) -> None:
    for name, linear in linears.items():
        half = linear.weight.half().float()
        books.add(name, linear.weight, half, 16 * half.numel())
        linear.weight = nn.Parameter(half, requires_grad=False)


def _mixture(linears: dict[str, nn.Linear], setting: Setting, sensitivity: Mapping[str, float]) -> dict[str, Grid]:
    if setting.target_bits is None:
        return {}
    weights = [(linear.weight, sensitivity.get(name)) for name, linear in linears.items()]
    candidates = [FORMATS[name] for name in MIXED]
    return dict(zip(linears, choose_formats(weights, candidates, setting.target_bits, setting.group), strict=True))


@contextmanager
def compressed(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    setting: Setting,
    inputs: Iterable[Any] = (),
    sensitivity: Mapping[str, float] | None = None,
) -> Iterator[Recorded]:
    """Compress `linears` while the context lasts; its value has their sizes and errors.

    `inputs` are to calibrate on; `sensitivity` of each layer is for settings with `target_bits`.
    """
    before = {name: (linear.weight, linear.bias) for name, linear in linears.items()}
    names = {weight.data_ptr(): name for name, (weight, _) in before.items()}
    books = Recorded(setting.method, names, _mixture(linears, setting, sensitivity or {}))
    try:
        if setting.format == "fp16":
            _round_to_half(linears, books)
        else:
            calibrate_(
                model, inputs, algorithm=books, format=setting.grid, group_size=setting.group, include_float32=True
            )
        yield books
    finally:
        for name, linear in linears.items():
            linear.weight, linear.bias = before[name]
