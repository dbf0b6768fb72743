"""Find the fastest tile for each problem on this GPU: `python -m benchmarks.tune [--out FILE]`.

Times every candidate for a weight [N, K], a dtype, a group size and the largest M of each bucket, in a CUDA graph over
rotating weights (timing.py), each result compared with float32 first. The table, rewritten after every problem:

    {"device", "capability", "driver_version", "torch", "triton", "commit", "date", ...,
     "rows": [{"format": "e2m3", "dtype": "fp16", "group_size": null, "n": 4096, "k": 4096,
               "m": 8,                               the bucket's largest
               "tile": {"BLOCK_N": 64, "BLOCK_M": 8, "num_warps": 2, "num_stages": 3, "SPLIT_K": 4, "JOIN": 1},
                                                     the fields of kernels.config.Config; null: ATen's matmul
               "us": 4.2, "heuristic_us": 4.4, "tried": 6, "failed": 0}]}

A table named after the device in fp6_compile/kernels/selection/tuned/ is what the package takes its tiles from.
heuristic_us is the time of the tile that config_for gives; a table is worth shipping where `us` is well below it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.linear import timing
from benchmarks.linear.bench import TOLERANCE, Ring
from benchmarks.linear.providers import SixBit, Spec
from benchmarks.linear.results import Row
from benchmarks.linear.shapes import SHAPES, Shape, get_shape
from benchmarks.sass.cases import DTYPES, NARROW, WIDE
from benchmarks.system import environment
from fp6_compile.formats import DEFAULT, FORMATS, Format, get_format
from fp6_compile.kernels.selection.choices import choices
from fp6_compile.kernels.selection.tuned import file_of
from fp6_compile.kernels.triton.config import Config

BUCKETS = [8, 16, 32, 64, 128, 256]


Tile = Config | None  # None: ATen's matmul on a dequantized copy


def candidates(
    m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, device: torch.device, fmt: Format
) -> list[Tile]:
    """Tiles worth timing: first the heuristic's, then its tiles for other sizes of weight and for M up to the next bucket.

    The latter with K whole: how finely K can be split depends on the problem.
    """
    how = (k, group_size, dtype, fmt)
    others = [
        choices(device, bucket, size, *how) for bucket in (m, *BUCKETS) for size in (WIDE, NARROW) if bucket <= 2 * m
    ]
    whole = [tile if tile is None else replace(tile, SPLIT_K=1) for tiles in others for tile in tiles]
    return list(dict.fromkeys([*choices(device, m, n, *how), *whole]))


def fastest(tiles: Sequence[Tile], seconds: Callable[[Tile], float]) -> Row:
    """The row's columns for the best of `tiles`, the first of which is the heuristic's. A tile that raises is skipped.

    Raises RuntimeError, from the last failure, when all of them do.
    """
    times: dict[Tile, float] = {}
    failure: Exception | None = None
    for tile in tiles:
        try:
            times[tile] = seconds(tile)
        except Exception as error:  # too much shared memory, or a wrong result
            failure = error
    if not times:
        raise RuntimeError(f"none of {len(tiles)} tiles ran") from failure
    best = min(times, key=lambda tile: times[tile])
    heuristic = times.get(tiles[0])
    return {
        **{"tile": best and asdict(best), "us": round(times[best] * 1e6, 3)},
        "heuristic_us": None if heuristic is None else round(heuristic * 1e6, 3),
        **{"tried": len(tiles), "failed": len(tiles) - len(times)},
    }


def with_tile(tile: Tile) -> Any:
    """Make the launcher use `tile` for every problem, until the context ends."""
    from fp6_compile.kernels.selection import launch

    return mock.patch.object(launch, "choices", return_value=(tile,))


def timed(device: timing.Device, ring: Ring, m: int, k: int, dtype: torch.dtype) -> Callable[[Tile], float]:
    """Seconds per call with a given tile. Raises ValueError for a wrong result."""
    x = torch.randn(m, k, dtype=dtype, device=device.device)
    calls = [lambda module=module: module(x) for module in ring.modules]

    def seconds(tile: Tile) -> float:
        with with_tile(tile):
            module = ring.modules[0]
            assert isinstance(module, SixBit)
            if not (error := module.error(x, module(x))) <= TOLERANCE:
                raise ValueError(f"wrong: relative error {error}")
            return timing.quantiles(timing.graph(device, calls, [ring.nbytes] * len(calls)))[1]

    return seconds


def tune(
    device: timing.Device,
    shapes: Iterable[Shape],
    dtypes: Sequence[str],
    format: str,
    group_size: int | None,
    buckets: Sequence[int],
) -> Iterable[Row]:
    """A row per shape, dtype and bucket, as they are found."""
    for shape in shapes:
        for name in dtypes:
            dtype = DTYPES[name]
            weight = torch.randn(shape.n, shape.k, dtype=dtype, device=device.device) / shape.k**0.5
            ring = Ring.of("fp6", weight, Spec(dtype, format, group_size), device.l2_bytes)
            for m in buckets:
                tiles = candidates(m, shape.n, shape.k, group_size, dtype, device.device, get_format(format))
                key = {"format": format, "dtype": name, "group_size": group_size}
                key |= {"n": shape.n, "k": shape.k, "m": m}
                yield key | fastest(tiles, timed(device, ring, m, shape.k, dtype))


def main() -> int:
    """Exit code 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the package's own table of this device, unless given")
    parser.add_argument("--shapes", nargs="+", type=get_shape, default=SHAPES)
    parser.add_argument("--m", nargs="+", type=int, default=BUCKETS, help="the largest M of each bucket")
    parser.add_argument("--dtype", nargs="+", default=["fp16", "bf16"], choices=["fp16", "bf16"])
    parser.add_argument("--format", default=DEFAULT, choices=sorted(FORMATS))
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--dry-run", action="store_true", help="the CPU as a stand-in: times mean nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.shapes, arguments.m = [get_shape("256x512")], arguments.m[:2]
        return _tune(timing.Cpu(), arguments, {"kind": "stand-in", **environment.versions()}, arguments.out)
    if not torch.cuda.is_available():
        print("benchmarks.tune: no CUDA device; tiles are timed, not predicted")
        return 2
    out = arguments.out or file_of(torch.cuda.get_device_name())
    return _tune(timing.Gpu(), arguments, {**environment.gpu(), **environment.versions()}, out)


def _tune(device: timing.Device, arguments: argparse.Namespace, about: Row, out: Path) -> int:
    out.parent.mkdir(exist_ok=True)
    rows: list[Row] = []
    what = arguments.shapes, arguments.dtype, arguments.format, arguments.group_size, arguments.m
    for row in tune(device, *what):
        rows.append(row)
        print(row, flush=True)
        beside = out.with_suffix(".part")
        beside.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        os.replace(beside, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
