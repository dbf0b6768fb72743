"""How fast this machine reads memory, as far as torch can tell."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch


def read_bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """GB/s of reading a gigabyte with torch's present threads, by the fastest of several reductions."""
    memory = torch.ones(1 << 28, dtype=torch.int32)
    reads: list[Callable[[], Any]] = [
        memory.amax,
        memory.view(torch.float32).sum,
        lambda: memory.view(torch.int8).amax(),
    ]
    best = 0.0
    for read, _ in itertools.product(reads, range(4)):
        start = clock()
        read()
        best = max(best, memory.nbytes / (clock() - start) / 1e9)
    return best
