"""Run Triton kernels on CPU tensors: one long-lived process in which Triton interprets.

    out = interpreted(launch.mm, x, planes, scale, fmt, None)

Triton decides when a kernel is defined whether `@triton.jit` compiles or interprets, so a test process, which also compiles,
cannot do both. The function is named, not sent: the child imports its module anew, with the interpreter on. One process
serves a whole test session (a start costs seconds), and every case stays a test of its own.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")


def interpreted(function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns in the interpreting process; function and arguments are pickled."""
    # Bytes, because tensors that the executor pickles travel through shared memory files instead.
    result: T = pickle.loads(_executor().submit(_call, pickle.dumps((function, args))).result())
    return result


@functools.cache
def _executor() -> ProcessPoolExecutor:
    executor = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_prepare)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        executor.submit(os.getpid).result()  # the process starts here, and keeps this environment
    return executor


def _prepare() -> None:
    """Put right what the child's interpreter gets wrong."""
    import torch

    from . import interpreter_fixes

    interpreter_fixes.apply()
    torch.set_num_threads(1)


def _call(job: bytes) -> bytes:
    function, args = pickle.loads(job)
    return pickle.dumps(function(*args))
