"""One row's weights: every linear of a model replaced by what a setting makes of it, for as long as it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.accuracy.metrics import sqnr
from examples.accuracy.settings import GRIDS, SIX_BITS, Setting
from fp6_compile.quantize import dequantize, quantize


class Compressed(NamedTuple):
    """What stands for a weight [N, K] (float32), and the bits that store it: codes, scales and side factors."""

    weight: Tensor
    stored_bits: int


def compress(weight: Tensor, setting: Setting) -> Compressed:
    """`weight` [N, K] as `setting` stores it."""
    if setting.format == "fp16":
        return Compressed(weight.half().float(), 16 * weight.numel())
    names = SIX_BITS if setting.format == "auto" else (setting.format,)
    candidates = [_quantized(weight, name, setting) for name in names]
    return min(candidates, key=lambda c: float((c.weight - weight).square().sum()))


def _quantized(weight: Tensor, name: str, setting: Setting) -> Compressed:
    grid = GRIDS[name]
    scale = "absmax" if setting.algorithm == "rtn" else setting.algorithm
    codes, scales = quantize(weight, grid, setting.group, scale)  # type: ignore[arg-type]
    approximation = dequantize(codes, scales, grid, setting.group, torch.float32)  # type: ignore[arg-type]
    return Compressed(approximation, grid.bits * weight.numel() + 32 * scales.numel())


@contextmanager
def compressed(linears: dict[str, nn.Linear], setting: Setting) -> Iterator[tuple[float, dict[str, float]]]:
    """Compress `linears` while the context lasts; its value: bits per weight, and the SQNR of each."""
    originals = {name: linear.weight.data for name, linear in linears.items()}
    stored, error = 0, {}
    try:
        for name, linear in linears.items():
            result = compress(originals[name], setting)
            error[name] = round(sqnr(originals[name], result.weight), 2)
            linear.weight.data = result.weight
            stored += result.stored_bits
        yield stored / sum(w.numel() for w in originals.values()), error
    finally:
        for name, linear in linears.items():
            linear.weight.data = originals[name]
