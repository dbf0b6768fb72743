"""Bytes in memory, of this process on a CPU (Linux), allocated by it on a GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

MARGIN = 1.1  # of the weights' size, for all that is not weights


def check(nbytes: float, device: str) -> None:
    """Raises MemoryError where weights of `nbytes` have no room; a CPU's process would be killed, others' with it."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _field("/proc/meminfo", "MemAvailable")
    if free is not None and nbytes * MARGIN > free:
        raise MemoryError(f"weights of {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def resident(device: str) -> int | None:
    """Now."""
    return torch.cuda.memory_allocated() if device == "cuda" else _field("/proc/self/status", "VmRSS")


def peak(device: str) -> int | None:
    """At most, since the process began."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _field("/proc/self/status", "VmHWM")


def trim(device: str) -> None:
    """Give back what was freed while packing and compiling; allocators keep it otherwise."""
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


def _field(file: str, name: str) -> int | None:
    if not Path(file).exists():
        return None
    (line,) = [line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
