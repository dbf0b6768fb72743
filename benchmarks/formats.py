"""Formats side by side on the weights of the shipped model: `python -m benchmarks.formats` prints the table of docs/results/accuracy.md.

SQNR: the weights' squares over the errors' squares, in dB, by absmax scales per row and per group of 64. INT6 and INT4 are
here to be compared with, as symmetric integers: nothing else of this package knows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from examples.code_lm.checkpoint import load_pretrained
from fp6_compile.formats import AUTO, FORMATS
from fp6_compile.quantize import choose_format, dequantize, quantize

ROWS = ("e4m3", "e3m3", "auto", "e2m3", "e3m2", "e2m2", "e3m1", "e2m1", "int6", "int4")
GROUPS = (None, 64)


def quantized(weight: Tensor, name: str, group_size: int | None) -> Tensor:
    """`weight` [N, K] in float32 as `name` holds it: a format, "auto", or "int4" and the like."""
    if name.startswith("int"):
        return _integers(weight, int(name[3:]), group_size or weight.shape[1])
    if name == "auto":
        name = choose_format([weight], [FORMATS[each] for each in AUTO], group_size).name
    return dequantize(*quantize(weight, FORMATS[name], group_size), FORMATS[name], group_size, torch.float32)


def _integers(weight: Tensor, bits: int, size: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    groups = [part.float() for part in weight.split(size, 1)]
    scales = [(part.abs().amax(1, keepdim=True) / most).clamp_(min=1e-30) for part in groups]
    return torch.cat([(part / scale).round_() * scale for part, scale in zip(groups, scales, strict=True)], 1)


def sqnr(weights: Sequence[Tensor], name: str, group_size: int | None) -> float:
    """In dB, over all of `weights` together."""
    signal = sum(float(weight.double().square().sum()) for weight in weights)
    noise = sum(float((quantized(w, name, group_size).double() - w.double()).square().sum()) for w in weights)
    return 10 * math.log10(signal / noise)


def bits_per_weight(weights: Sequence[Tensor], name: str, group_size: int | None) -> float:
    """Bits of codes and float32 scales, padding left out, over the number of weights."""
    bits = FORMATS[AUTO[0] if name == "auto" else name].bits if not name.startswith("int") else int(name[3:])
    scales = sum(w.shape[0] * -(-w.shape[1] // (group_size or w.shape[1])) for w in weights)
    return bits + 32 * scales / sum(w.numel() for w in weights)


def main() -> None:
    """Print the table."""
    model = load_pretrained()
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    print("| format | bits per weight, per row / group of 64 | SQNR in dB, per row / group of 64 |\n|---|---|---|")
    for name in ROWS:
        bits = " / ".join(f"{bits_per_weight(weights, name, group):.2f}" for group in GROUPS)
        noise = " / ".join(f"{sqnr(weights, name, group):.1f}" for group in GROUPS)
        print(f"| {name.upper() if name != 'auto' else '`auto`'} | {bits} | {noise} |", flush=True)


if __name__ == "__main__":
    main()
