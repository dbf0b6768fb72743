"""Packed weights: made once per parameter, shared by every graph that reads it, and never stale.

The parameter stays the user's own, and they may change it after compilation: `copy_`, `load_state_dict`, an optimizer step,
`p.data = ...`, `module.weight = nn.Parameter(...)`. None of that fails a Dynamo guard, so every call asks each packed weight
whether it still belongs to what it was made from: the same tensor, the same storage, the same version. If not, the new
values are quantized into the same buffers, so that addresses that CUDA graphs have recorded stay good.

One kind of change leaves no trace in PyTorch: writing in place through `.data`, as in `p.data.mul_(2)` or the
`p.data += delta` of some LoRA merges (autograd's own check misses it too). For that there is `refresh(model)`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from fp6_compile.formats import get_format
from fp6_compile.packing import pack
from fp6_compile.quantize import quantize
from fp6_compile.report import count


@dataclass(frozen=True)
class PackSpec:
    """How a parameter is packed. `transposed`: it is [K, N], as in `x @ W`, and is packed the other way round."""

    format: str
    group_size: int | None
    scale: str
    layout: str
    transposed: bool
    device: torch.device


class PackedWeight:
    """The tensors (w4, w2, scale) of one parameter, and the state of the parameter that they were made from."""

    def __init__(self, parameter: Tensor, spec: PackSpec, name: str) -> None:
        self.spec = spec
        self.name = name
        with torch.inference_mode(False):  # Inference tensors could not be refreshed outside inference mode.
            self.tensors = self._quantized(parameter)
        self._remember(parameter)
        count("weights_packed")

    def refresh(self, parameter: Tensor) -> None:
        """Quantize `parameter` into the same tensors. If it is refused (NaN), they are left as they were."""
        with torch.inference_mode(False):
            for mine, new in zip(self.tensors, self._quantized(parameter), strict=True):
                mine.copy_(new)
        self._remember(parameter)
        count("weights_refreshed")

    def is_fresh(self, parameter: Tensor) -> bool:
        """Whether the tensors hold the present values of `parameter`. Runs for every weight of every call: keep it small."""
        return (
            self._id == id(parameter)
            and self._version == parameter._version
            and self._storage.cdata == parameter.untyped_storage()._cdata
            and self._address == parameter.data_ptr()
        )

    def belongs_to(self, parameter: Tensor) -> bool:
        """Whether it was made from this very parameter, fresh or not."""
        return self._id == id(parameter)

    def invalidate(self) -> None:
        """Make `is_fresh` false until the next refresh."""
        self._version = -1

    @property
    def is_orphan(self) -> bool:
        """Whether its parameter is gone, so that a successor may have its buffers."""
        return self._id is None

    def _quantized(self, parameter: Tensor) -> tuple[Tensor, ...]:
        spec, fmt = self.spec, get_format(self.spec.format)
        with torch.no_grad():
            weight = parameter.detach().t() if spec.transposed else parameter.detach()
            try:
                codes, scale = quantize(weight, fmt, spec.group_size, spec.scale)
            except ValueError as error:
                raise ValueError(f"fp6: cannot quantize {self.name}: {error}") from error
            return *pack(codes, fmt, spec.layout), scale

    def _remember(self, parameter: Tensor) -> None:
        self._id: int | None = id(parameter)
        self._version = parameter._version
        # Weak, or the float weight could never be freed. But held: while it is, no other storage can get its identity.
        self._storage = StorageWeakRef(parameter.untyped_storage())
        self._address = parameter.data_ptr()
        self._finalizer = weakref.ref(parameter, self._forget)  # ids, too, are handed out again

    def _forget(self, reference: weakref.ref) -> None:
        if reference is self._finalizer:
            self._id = None


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(parameter: Tensor, spec: PackSpec, name: str) -> PackedWeight:
    """The packed weight of `parameter`, made now or by an earlier graph (another shape, prefill and decode)."""
    by_spec = _packed.setdefault(parameter, {})
    if spec not in by_spec:
        by_spec[spec] = PackedWeight(parameter, spec, name)
    return by_spec[spec]


class WeightInput:
    """The place of one weight among the inputs of a compiled graph."""

    def __init__(self, position: int, packed: PackedWeight) -> None:
        self.position = position
        self.packed = packed

    def tensors(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """(w4, w2, scale) of the parameter that this call passes, refreshed if it has changed."""
        if not self.packed.is_fresh(parameter):
            self._catch_up(parameter)
        return self.packed.tensors

    def _catch_up(self, parameter: Tensor) -> None:
        packed = self.packed
        if not packed.belongs_to(parameter):
            by_spec = _packed.setdefault(parameter, {})
            # Dynamo runs one graph for all layers that look alike: then each has its own planes. Only the successor of a
            # parameter that is gone takes over its planes.
            if packed.is_orphan and packed.spec not in by_spec:
                by_spec[packed.spec] = packed
            self.packed = packed = packed_weight(parameter, packed.spec, packed.name)
        if not packed.is_fresh(parameter):
            packed.refresh(parameter)


def refresh(model: torch.nn.Module) -> None:
    """Quantize the weights of `model` anew at their next use; only needed after writing in place through `.data`."""
    for parameter in model.parameters():
        for packed in _packed.get(parameter, {}).values():
            packed.invalidate()


def forget_weights() -> None:
    """Forget the planes of all parameters; graphs that are still alive keep theirs."""
    _packed.clear()
