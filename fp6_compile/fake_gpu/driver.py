"""A driver for Triton that names its target and can do nothing else: kernels are generated for it, not launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from unittest import mock

import torch


class _Driver:
    """A Triton driver that can name a target and nothing more."""

    def __init__(self, target: object) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.get_device_interface = lambda: torch.cuda
        self.get_active_torch_device = lambda: torch.device("cuda", 0)


@contextlib.contextmanager
def fake_target(sm: int) -> Iterator[None]:
    """Inside: Triton's target is sm_{sm}. Raises ImportError where Triton is missing."""
    from fp6_compile._compat.triton import GPUTarget, driver
    from fp6_compile.kernels.selection.choices import describe

    describe.cache_clear()
    try:
        with mock.patch.object(driver, "_active", _Driver(GPUTarget("cuda", sm, 32))):
            yield
    finally:
        describe.cache_clear()


def no_self_test() -> AbstractContextManager[object]:
    """Inside, the self-test of wgmma, which would launch kernels, fails: wgmma is not used."""
    from fp6_compile.kernels.selection import selftest

    return mock.patch.object(selftest, "passes", return_value=False)
