"""The command that checks a packed folder."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fp6_compile.checkpoint.manifest import Manifest
from fp6_compile.cli.table import table
from fp6_compile.formats import get_format
from fp6_compile.quantize import dequantize, sqnr
from fp6_compile.report import progress
from fp6_compile.storage.scaled import stored


def verify(arguments: argparse.Namespace) -> int:
    """Check sizes, hashes, shapes, dtypes and scales. With --against, compare with the folder it was made from: every code
    must be the nearest to its weight, and every other tensor the same."""
    manifest = Manifest.read(arguments.folder)
    print(f"{arguments.folder}: whole, {len(manifest.weights)} packed weights, {len(manifest.plain)} other tensors")
    if arguments.against is None:
        return 0
    originals = stored(arguments.against, [*manifest.weights, *manifest.plain])
    rows, bad = [("weight", "SQNR dB", "verdict")], 0
    for name in progress([*manifest.weights, *manifest.plain], "fp6: verifying"):
        entry = originals.get(name)
        if entry is None:
            verdict, noise = "not in SRC", None
        else:
            verdict, noise = _compare(manifest, name, entry.read())
        optional = entry is None and name in manifest.plain  # buffers that no checkpoint has
        bad += verdict != "same" and not optional
        if name in manifest.weights or (verdict != "same" and not optional):
            rows.append((name.removesuffix(".weight"), "" if noise is None else f"{noise:.2f}", verdict))
    table(rows)
    print(f"\n{bad} differ" if bad else "\nall match")
    return 1 if bad else 0


def _compare(manifest: Manifest, name: str, original: Tensor) -> tuple[str, float | None]:
    if name in manifest.plain:
        mine = manifest.plain[name].read()
        same = mine.shape == original.shape and torch.equal(mine, original.to(mine.dtype))
        return "same" if same else "differs", None
    weight = manifest.weights[name]
    if tuple(original.shape) != tuple(weight.shape) or not original.is_floating_point():
        return f"SRC has {original.dtype} {list(original.shape)}", None
    packed = weight.read(name, manifest.entries)
    fmt, group_size, original = get_format(weight.spec.format), weight.spec.group_size, original.float()
    codes, scale = packed.codes(), packed.scale
    per_weight = scale.T.repeat_interleave(group_size or weight.shape[1], 1)[:, : weight.shape[1]]
    nearest = torch.equal(fmt.encode(original / per_weight), codes)
    noise = sqnr(original, dequantize(codes, scale, fmt, group_size, torch.float32))
    return "same" if nearest else "codes are not the nearest", noise
