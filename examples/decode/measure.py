"""One backend in a process of its own, so that its memory is its own.

The process builds and compiles, reports, and then decodes a round whenever it is asked to: two processes can take turns on a
noisy machine.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from examples.code_lm.model import KVCache
from examples.decode.loop import decode, make_step
from examples.decode.model import SIZES, build, weight_bytes


@dataclass(frozen=True)
class Settings:
    """What is decoded, and by what."""

    backend: str
    size: str
    device: str
    batch: int
    tokens: int
    threads: int | None
    packing: dict[str, Any] = field(default_factory=dict)


class Worker:
    """The process of one backend. `known` is what it said before decoding."""

    def __init__(self, settings: Settings) -> None:
        # Spawned: a fork would share this process's memory, and torch's threads do not survive one.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(settings, theirs))
        self._process.start()
        theirs.close()  # so that a process that dies ends the wait for it
        self.known: dict[str, Any] = self._pipe.recv()

    def round(self) -> tuple[list[float], list[int]]:
        """Seconds of every step of a round, and the tokens of its first sequence."""
        self._pipe.send(True)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def serve(settings: Settings, pipe: Connection) -> None:
    """Run in the process: send what is known before decoding, then (seconds, tokens) of a round per message received."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = settings.device
    started = time.perf_counter()
    config, packed = SIZES[settings.size], settings.backend == "fp6"
    model = build(config, packed=packed, dtype=torch.bfloat16, device=device, **settings.packing)
    built = time.perf_counter()
    cache = KVCache.allocate(config, settings.batch, settings.tokens, dtype=torch.bfloat16, device=device)
    step = torch.compile(make_step(model, cache), backend=settings.backend, fullgraph=True)
    decode(step, settings.batch, 3, device)
    compiled = time.perf_counter()
    _trim()
    total, read = weight_bytes(model)
    pipe.send(
        {
            "parameters": sum(p.numel() for p in _shapes(settings).parameters()),
            "weight_bytes": total,
            "read_bytes": read,
            "resident_bytes": _resident(device),
            "build_s": round(built - started, 1),
            "compile_s": round(compiled - built, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    )
    while pipe.recv():
        pipe.send(decode(step, settings.batch, settings.tokens, device))


def _trim() -> None:
    """Give back what was freed while packing and compiling; glibc's allocator keeps it otherwise."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _shapes(settings: Settings) -> torch.nn.Module:
    from examples.code_lm.model import CodeLM

    with torch.device("meta"):
        return CodeLM(SIZES[settings.size])


def _resident(device: str) -> int | None:
    """Bytes of this process in memory (Linux), or allocated on the device."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024
