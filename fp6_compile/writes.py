"""Packed weights that one thread writes while others read them: a reader sees all of the old weight, or all of the new.

Planes and scale are written in place, because CUDA graphs know their addresses, so a reader could see the new planes with
the old scale. A number tells: it is odd during a write, and another one afterwards. Readers look at it before and after,
which costs them nothing else, and read again, behind the writer, if it has changed. One number for all weights: writes are
rare, and a read for nothing does no harm.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.RLock()
_writes = 0


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """The time in which planes and scales are written. Writers wait for each other."""
    global _writes
    with _lock:
        _writes += 1
        try:
            yield
        finally:
            _writes += 1


def undisturbed(read: Callable[P, T]) -> Callable[P, T]:
    """`read`, which must have no effects, repeated if anything was written meanwhile. Compilers see `read` as it is."""

    @functools.wraps(read)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return read(*args, **kwargs)
        before = _writes
        result = read(*args, **kwargs)
        if before == _writes and before % 2 == 0:
            return result
        with _lock:
            return read(*args, **kwargs)

    return wrapper
