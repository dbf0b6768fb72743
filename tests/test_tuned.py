"""Measured tiles: read from the device's table, taken first, and only where they were measured."""

import json

import pytest
import torch

from fp6_compile.formats import FORMATS
from fp6_compile.kernels.selection import choices as device
from fp6_compile.kernels.selection import selftest, tuned
from fp6_compile.kernels.triton.config import Config, Device, candidates

F16, BF16, E3M2, E2M3 = torch.float16, torch.bfloat16, FORMATS["e3m2"], FORMATS["e2m3"]
NAME, CUDA = "A fake GPU", torch.device("cuda", 0)
TILE = {"BLOCK_N": 32, "BLOCK_M": 8, "num_warps": 2, "num_stages": 4, "SPLIT_K": 2, "JOIN": 1}
WGMMA = {**TILE, "BLOCK_N": 128, "BLOCK_M": 64, "num_warps": 8, "JOIN": 4}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table as benchmarks.tune writes it, rows out of order."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    key = {"format": "e3m2", "dtype": "fp16", "group_size": None, "n": 4096, "k": 4096}
    rows = [{**key, "m": 128, "tile": WGMMA}, {**key, "m": 8, "tile": TILE}, {**key, "m": 256, "tile": None}]
    assert tuned.file_of(NAME).parent == tmp_path
    tuned.file_of(NAME).write_text(json.dumps({"device": NAME, "rows": rows}))
    tuned._table.cache_clear()
    yield
    tuned._table.cache_clear()


@pytest.mark.parametrize(
    ("m", "expected"),
    [(1, (Config(**TILE),)), (8, (Config(**TILE),)), (9, (Config(**WGMMA),)), (256, (None,)), (257, ())],
)
def test_by_bucket(table, m, expected):
    assert tuned.tuned(NAME, m, 4096, 4096, None, F16, E3M2) == expected


OTHERS = [
    *((8192, 4096, None, F16, E3M2), (4096, 4096, 64, F16, E3M2)),
    *((4096, 4096, None, BF16, E3M2), (4096, 4096, None, F16, E2M3)),
]


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_for_what_was_not_measured(table, other):
    assert tuned.tuned(NAME, 1, *other) == ()
    assert tuned.tuned("another GPU", 1, 4096, 4096, None, F16, E3M2) == ()


@pytest.mark.parametrize("passed", [True, False])
def test_the_measured_tile_comes_first(table, monkeypatch, passed):
    """Timed again by max-autotune, taken as it is without; wgmma only where its self-test has passed."""
    about = Device("sm_90", 132, name=NAME)
    monkeypatch.setattr(device, "describe", lambda _: about)
    monkeypatch.setattr(selftest, "passes", lambda *problem, may_launch: passed)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    small = device.choices(CUDA, 3, 4096, 4096, None, F16, E3M2)
    assert small[0] == Config(**TILE)
    assert set(candidates(3, 4096, 4096, None, F16, about)) <= set(small)
    assert len(small) <= 6
    many = device.choices(CUDA, 100, 4096, 4096, None, F16, E3M2)
    assert (many[0] == Config(**WGMMA)) == passed
    assert all(tile is None or tile.JOIN == 1 for tile in many) != passed
    assert device.choices(CUDA, 200, 4096, 4096, None, F16, E3M2)[0] is None
