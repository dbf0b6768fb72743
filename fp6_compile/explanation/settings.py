"""Settings of torch that change what torch.compile makes of a call: read in one process, applied in another."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from fp6_compile._compat.torch import CONFIG_MODULES, changed_settings

_AUTOCAST = ("cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """autocast: whether it is on, and its dtype, by type of device. configs: what differs from the defaults, by module."""

    grad: bool
    inference: bool
    dtype: torch.dtype
    matmul_precision: str
    autocast: dict[str, tuple[bool, torch.dtype]]
    configs: dict[str, dict[str, Any]]

    @classmethod
    def of_this_thread(cls) -> Settings:
        """The settings of the thread that calls."""
        return cls(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            dtype=torch.get_default_dtype(),
            matmul_precision=torch.get_float32_matmul_precision(),
            autocast={kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST},
            configs={name: changed_settings(sys.modules[name]) for name in CONFIG_MODULES if name in sys.modules},
        )

    def apply(self, stack: contextlib.ExitStack) -> None:
        """Make them this thread's; grad mode and inference mode until `stack` is closed."""
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        for name, values in self.configs.items():
            import_module(name).load_config(values)
        stack.enter_context(torch.inference_mode(self.inference))
        stack.enter_context(torch.set_grad_enabled(self.grad))
