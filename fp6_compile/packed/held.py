"""What a packed weight consists of: its bit planes and its scale, and the PackingSpec that says how to read them.

The tensors lie in one tuple, because bit planes without their scale are no weight: a reader takes the tuple once and has one
state of the weight. A weight shares it with its aliases (`detach()`, `.data`, `.t()`): a writer replaces the tuple, and all
aliases have the new one at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, empty_like

from fp6_compile import ops  # noqa: F401  (defines fp6::dequantize)
from fp6_compile.formats import get_format
from fp6_compile.kernels.cpu import quantize as cpu
from fp6_compile.layouts import packing
from fp6_compile.layouts.packing import plane_names, unpack
from fp6_compile.layouts.spec import PackingSpec

if TYPE_CHECKING:
    from typing_extensions import Self

# Held while any weight gets other tensors: writes are rare.
_lock = threading.Lock()


class Held:
    """(*planes, scale).

    is_lent: whether they are another's, who frees and fills them (FSDP): they must stay these very tensors.
    """

    is_lent = False

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def write(self, source: Sequence[Tensor]) -> None:
        """Take the values of `source`, of the same shapes.

        On a CPU they go into new tensors, and other threads read on in the old ones. Elsewhere, and in memory that processes
        share, they go into the same tensors: CUDA graphs have recorded their addresses, other processes look there.
        """
        with _lock:
            own = all(type(t) is Tensor and t.device.type == "cpu" and not t.is_shared() for t in self.tensors)
            if own and not self.is_lent:
                self.tensors = tuple(empty_like(old).copy_(new) for old, new in zip(self.tensors, source, strict=True))
            else:
                for old, new in zip(self.tensors, source, strict=True):
                    old.copy_(new)

    def replace(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> None:
        """Hold `new`, a copy of `old`, unless something was written since."""
        with _lock:
            if self.tensors is old:
                self.tensors = new


class PackedBase(Tensor):
    """The data of a PackedTensor (tensor.py), on which the operators of dispatch.py are defined.

    Args:
        planes: the bit planes of `spec.format` in `spec.layout`, as `packing.pack` returns them.
        scale: [G, N] float32, on the device of the bit planes.
        spec: how to read them.
    """

    spec: PackingSpec
    is_part = False  # cut out of another weight: a copy of its codes, so that writing it would not reach that weight

    @staticmethod
    def __new__(cls, planes: Sequence[Tensor], scale: Tensor, spec: PackingSpec) -> Self:
        n, k = scale.shape[1], spec.k
        shape, strides = ((k, n), (1, k)) if spec.transposed else ((n, k), (k, 1))
        return torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=spec.dtype, device=scale.device)

    def __init__(self, planes: Sequence[Tensor], scale: Tensor, spec: PackingSpec) -> None:
        self._held = Held((*planes, scale))
        self.spec = spec

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """(*planes, scale), of one state of the weight: another thread may write it."""
        return self._held.tensors

    @property
    def is_lent(self) -> bool:
        """Whether its tensors must stay the ones that they are: they are FSDP's."""
        return self._held.is_lent

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """The bit planes, the low bits' first."""
        return self.tensors[:-1]

    @property
    def scale(self) -> Tensor:
        """The scales [G, N] float32."""
        return self.tensors[-1]

    # What __tensor_flatten__ names.
    w8 = property(lambda self: self._plane("w8"))
    w4 = property(lambda self: self._plane("w4"))
    w2 = property(lambda self: self._plane("w2"))
    w1 = property(lambda self: self._plane("w1"))

    def _plane(self, name: str) -> Tensor:
        return self.tensors[plane_names(get_format(self.spec.format)).index(name)]

    @property
    def packed_bytes(self) -> int:
        """Bytes of bit planes and scales; `nbytes` are those of the weight it stands for."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def data_ptr(self) -> int:
        """The address of its first bit plane, by which others tell weights that are tied from those that are not."""
        return self.planes[0].data_ptr()

    def codes(self) -> Tensor:
        """The codes [N, K] (uint8), whether it is transposed or not."""
        spec = self.spec
        return unpack(self.planes, get_format(spec.format), spec.layout, self.scale.shape[1], spec.k)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as an ordinary tensor, of its own dtype unless another is given: value times scale, rounded once."""
        how = (self.spec.format, self.spec.layout, self.spec.group_size, self.spec.k, dtype or self.dtype)
        *planes, scale = self.tensors
        weight: Tensor = torch.ops.fp6.dequantize(planes, scale, *how)
        return weight.t() if self.spec.transposed else weight

    def repack(self, layout: str) -> Self:
        """The same weight with its bit planes in another layout of `packing.LAYOUTS`."""
        spec = self.spec
        if layout == spec.layout:
            return self
        *planes, scale = self.tensors
        fast = cpu.repack(planes, spec.layout, layout, scale.shape[1], spec.k)
        new = fast or packing.repack(planes, get_format(spec.format), spec.layout, layout, scale.shape[1], spec.k)
        return type(self)(new, scale.clone(), spec._replace(layout=layout))

    def map(self, function: Callable[[Tensor], Tensor], **changes: Any) -> Self:
        """`function` of every tensor inside, with changes to the spec."""
        *planes, scale = self.tensors
        return type(self)([function(p) for p in planes], function(scale), self.spec._replace(**changes))
