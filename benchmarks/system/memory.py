"""Bytes in memory: resident in this process on a CPU (Linux), allocated by it on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MARGIN = 1.1  # times the size of the weights: room for activations and caches


def check(nbytes: float, device: str) -> None:
    """Raise MemoryError where weights of `nbytes` do not fit; otherwise the system may kill this or another process."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _field("/proc/meminfo", "MemAvailable")
    if free is not None and nbytes * MARGIN > free:
        raise MemoryError(f"weights of {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def resident(device: str) -> int | None:
    """Bytes that are in memory now."""
    return torch.cuda.memory_allocated() if device == "cuda" else _field("/proc/self/status", "VmRSS")


def peak(device: str) -> int | None:
    """The most bytes since the process began."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _field("/proc/self/status", "VmHWM")


@contextlib.contextmanager
def resident_peak(found: dict[str, Any]) -> Iterator[None]:
    """Put the most anonymous memory above that of the start, sampled every 5 ms, and seconds into `found`, in megabytes."""
    before, most, done = _anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, _anonymous())
            done.wait(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    yield
    found["seconds"] = round(time.perf_counter() - start, 2)
    done.set()
    thread.join()
    found["resident_peak_mb"] = round((max(most, _anonymous()) - before) / 1e6)


def trim(device: str) -> None:
    """Return freed memory to the system, which allocators otherwise keep."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if release is not None:
        release(0)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _anonymous() -> int:
    """Anonymous resident bytes of this process (Linux)."""
    found = _field("/proc/self/status", "RssAnon")
    assert found is not None
    return found


def _field(file: str, name: str) -> int | None:
    if not Path(file).exists():
        return None
    (line,) = [line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
