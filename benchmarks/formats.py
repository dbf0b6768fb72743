"""Formats side by side on the weights of the shipped model: `python -m benchmarks.formats`
prints the table of docs/results/accuracy.md.

SQNR in dB over all weights, with absmax scales per row and per group of 64. INT6 and INT4 are there for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.accuracy.grids import Integer
from examples.code_lm.checkpoint import load_pretrained
from fp6_compile import quantize
from fp6_compile.formats import AUTO, FORMATS

GRIDS: dict[str, quantize.Grid] = {**FORMATS, "int6": Integer(6), "int4": Integer(4)}
ROWS = ("e4m3", "e3m3", "auto", "e2m3", "e3m2", "e2m2", "e3m1", "e2m1", "int6", "int4")
GROUPS = (None, 64)


def quantized(weight: Tensor, name: str, group_size: int | None) -> Tensor:
    """`weight` [N, K] in float32, quantized to a grid of GRIDS or to the better format of "auto", and dequantized."""
    if name == "auto":
        name = quantize.choose_format([weight], [FORMATS[each] for each in AUTO], group_size).name
    grid = GRIDS[name]
    return quantize.dequantize(*quantize.quantize(weight, grid, group_size), grid, group_size, torch.float32)


def sqnr(weights: Sequence[Tensor], name: str, group_size: int | None) -> float:
    """In dB, over all of `weights` together."""
    rounded = torch.cat([quantized(weight, name, group_size).flatten() for weight in weights])
    return quantize.sqnr(torch.cat([weight.flatten() for weight in weights]), rounded)


def bits_per_weight(weights: Sequence[Tensor], name: str, group_size: int | None) -> float:
    """Bits of codes and float32 scales, padding left out, over the number of weights."""
    scales = sum(w.shape[0] * -(-w.shape[1] // (group_size or w.shape[1])) for w in weights)
    return GRIDS[AUTO[0] if name == "auto" else name].bits + 32 * scales / sum(w.numel() for w in weights)


def main() -> None:
    """Print the table."""
    model = load_pretrained()
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    rows = []
    for name in ROWS:
        bits = " / ".join(f"{bits_per_weight(weights, name, group):.2f}" for group in GROUPS)
        noise = " / ".join(f"{sqnr(weights, name, group):.1f}" for group in GROUPS)
        rows.append((name.upper() if name != "auto" else "`auto`", bits, noise))
    head = ("format", "bits per weight, per row / group of 64", "SQNR in dB, per row / group of 64")
    print(tabulate(rows, head, tablefmt="pipe"))


if __name__ == "__main__":
    main()
