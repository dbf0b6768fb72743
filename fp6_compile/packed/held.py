"""The tensors of a packed weight, in a place that the weight shares with its aliases (`detach()`, `.data`, `.t()`).

Planes without their scale are no weight. So they lie in one tuple: a reader takes it once and has one state of the weight,
and a writer puts another tuple in its place, which reaches every alias at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor, empty_like

# Held while any weight gets other tensors: writes are rare.
_lock = threading.Lock()


class Held:
    """(*planes, scale)."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def write(self, source: Sequence[Tensor]) -> None:
        """Take the values of `source`, of the same shapes.

        On a CPU they go into new tensors, and other threads read on in the old ones. Elsewhere, and in memory that processes
        share, they go into the same tensors: CUDA graphs have recorded their addresses, other processes look there.
        """
        with _lock:
            if all(type(t) is Tensor and t.device.type == "cpu" and not t.is_shared() for t in self.tensors):
                self.tensors = tuple(empty_like(old).copy_(new) for old, new in zip(self.tensors, source, strict=True))
            else:
                for old, new in zip(self.tensors, source, strict=True):
                    old.copy_(new)

    def replace(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> None:
        """Hold `new`, a copy of `old`, unless something was written since."""
        with _lock:
            if self.tensors is old:
                self.tensors = new
