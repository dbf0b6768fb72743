"""Tiles that were measured: a table per GPU, tuned/<name of the device>.json, as `python -m benchmarks.tune` writes it.

A table has a row per weight shape, format, dtype, group size and largest M of a bucket. The rest is left to config.py.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from fp6_compile.formats import Format
from fp6_compile.kernels.triton.config import Config

FOLDER = Path(__file__).parent / "tuned"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# (format, dtype, group_size, n, k) -> tiles by largest M, in rising order; None: ATen's matmul.
Table = dict[tuple[str, torch.dtype, int | None, int, int], dict[int, Config | None]]


def file_of(device_name: str) -> Path:
    """Where the table of the device called so by torch.cuda.get_device_name is."""
    return FOLDER / f"{device_name.replace(' ', '_')}.json"


def tuned(
    device_name: str, m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, fmt: Format
) -> tuple[Config | None, ...]:
    """The measured tile for x [m, k] of `dtype` and a weight [n, k] in `fmt`; empty where none was measured."""
    tiles = _table(device_name).get((fmt.name, dtype, group_size, n, k), {})
    return next(((tile,) for largest, tile in tiles.items() if m <= largest), ())


@functools.cache
def _table(device_name: str) -> Table:
    path = file_of(device_name)
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    table: Table = {}
    for row in sorted(rows, key=lambda row: row["m"]):
        tile = row["tile"] and Config(**row["tile"])
        key = (row["format"], _DTYPES[row["dtype"]], row["group_size"], row["n"], row["k"])
        table.setdefault(key, {})[row["m"]] = tile
    return table
