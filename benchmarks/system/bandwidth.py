"""How fast torch reads memory on this machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch


def read_bandwidth(clock: Callable[[], float] = time.perf_counter, device: str = "cpu") -> float:
    """GB/s of reading a gigabyte with torch's threads, by the fastest of several reductions.

    On a GPU it is timed by events on its stream, not by `clock`.
    """
    memory = torch.ones(1 << 28, dtype=torch.int32, device=device)
    reads: list[Callable[[], Any]] = [
        memory.amax,
        memory.view(torch.float32).sum,
        lambda: memory.view(torch.int8).amax(),
    ]
    best = 0.0
    for read, _ in itertools.product(reads, range(4)):
        seconds = _by_events(read) if device == "cuda" else _by_clock(read, clock)
        best = max(best, memory.nbytes / seconds / 1e9)
    return best


def _by_clock(read: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    read()
    return clock() - start


def _by_events(read: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    read()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
