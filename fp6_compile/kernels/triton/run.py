"""One launch of the kernel with a given tile: what the launcher, the self-test and the tuner have in common."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from fp6_compile._compat.triton import JITFunction
from fp6_compile.formats import Format
from fp6_compile.kernels.triton.config import LOCKS, Config, constexprs
from fp6_compile.kernels.triton.mm import mm_kernel

# TRITON_INTERPRET is read by triton.jit, when the kernel is defined.
T = TypeVar("T")
INTERPRETED = not isinstance(mm_kernel, JITFunction)
# int32 of zeros for recorded launches, 1 MiB a device: 1,000 to 4,000 launches.
_ARENA = 1 << 18
_arenas: dict[torch.device, _Arena] = {}


def uses_asm(device_type: str) -> bool:
    """Whether the kernel for `device_type` ("cuda", "cpu", ...) unpacks by PTX: only on NVIDIA, never interpreted."""
    return device_type == "cuda" and torch.version.hip is None and not INTERPRETED


def run(
    config: Config, x: Tensor, planes: Sequence[Tensor], scale: Tensor, fmt: Format, group_size: int | None
) -> Tensor:
    """x @ weight.T by the tile `config`; the arguments are `launch.mm`'s, x with unit stride along K and M, N > 0."""
    (m, k), n = x.shape, scale.shape[1]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    parts, locks = out, out  # not read unless K is split
    grid = (-(-n // config.BLOCK_N) * -(-m // config.BLOCK_M) * config.SPLIT_K,)  # triton.cdiv takes 4 us a call
    if config.SPLIT_K > 1:
        if (tiles := grid[0] // config.SPLIT_K) > LOCKS:
            raise ValueError(f"config: {config} splits {tiles} tiles, at most {LOCKS} can be")
        parts, locks = out.new_empty(config.SPLIT_K, m, n, dtype=torch.float32), _locks(x.device, tiles)
    options = {} if INTERPRETED else {"num_warps": config.num_warps, "num_stages": config.num_stages}
    constants = constexprs(config, fmt, group_size, k, uses_asm(x.device.type))
    with device_of(x):
        mm_kernel[grid](x, *three(planes), scale, out, parts, locks, m, n, k, x.stride(0), **constants, **options)
    return out


def three(planes: Sequence[T]) -> list[T | None]:
    """A format has one to three planes, a kernel three arguments for them."""
    return [*planes, None, None][:3]


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    return nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)


def _locks(device: torch.device, count: int) -> Tensor:
    """`count` zeros that every launch leaves as it found them, so one tensor serves all launches of a stream in turn."""
    if device.type == "cpu":
        return _zeros(device, 0)
    arena = _arenas.setdefault(device, _Arena())
    if torch.cuda.is_current_stream_capturing():
        return arena.take(device, count)
    arena.prepare(device)
    return _zeros(device, torch.cuda.current_stream(device).cuda_stream)


class _Arena:
    """Zeros for launches that are being recorded. Each gets some of its own, because a recorded graph may run beside
    anything; none is filled in the graph, which would be one more kernel for each launch. What is taken is not given back:
    after the last, launches fill their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Make the zeros, while nothing is being recorded."""
        if self._left is None:
            self._left = torch.zeros(_ARENA, dtype=torch.int32, device=device)

    def take(self, device: torch.device, count: int) -> Tensor:
        """`count` zeros that nobody else has."""
        with self._lock:
            if self._left is None or len(self._left) < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            taken, self._left = self._left[:count], self._left[count:]
            return taken


@functools.cache
def _zeros(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(LOCKS, dtype=torch.int32, device=device)
