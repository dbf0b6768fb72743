"""Packed weights: made once per parameter, shared by every graph that reads it, and never stale.

Weights that multiply the same input lie side by side in one set of planes, so that one matmul reads them all (merging.py);
each still follows its own parameter, in its own rows. A weight that one graph has in such a set and another graph has alone,
or in another set, is packed for each. A parameter that is packed already (a PackedTensor) is moved into the set, and has its
own planes there from then on: it takes no more memory than before.

The parameter stays the user's own, and they may change it after compilation: `copy_`, `load_state_dict`, an optimizer step,
`p.data = ...`, `module.weight = nn.Parameter(...)`. None of that fails a Dynamo guard, so every call asks each packed weight
whether it still belongs to what it was made from: the same tensor, the same storage, the same version. If not, the new
values are quantized into the same buffers, so that addresses that CUDA graphs have recorded stay good.

One kind of change leaves no trace in PyTorch: writing in place through `.data`, as in `p.data.mul_(2)` or the
`p.data += delta` of some LoRA merges (autograd's own check misses it too). For that there is `refresh(model)`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from fp6_compile.formats import get_format
from fp6_compile.packing import pack
from fp6_compile.quantize import quantize
from fp6_compile.report import count, refreshed


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
    """The tensors (*planes, scale) of one parameter, and the state of the parameter that they were made from.

    The tensors may be rows of larger ones, of `Planes`.
    """

    def __init__(self, parameter: Tensor, spec: PackSpec, name: str) -> None:
        self.spec = spec
        self.name = name
        with torch.inference_mode(False):  # Inference tensors could not be refreshed outside inference mode.
            self.tensors = self._quantized(parameter)
        self._remember(parameter)
        if not hasattr(parameter, "planes"):
            count("weights_packed")

    def refresh(self, parameter: Tensor) -> None:
        """Quantize `parameter` into the same tensors. If it is refused (NaN), they are left as they were."""
        with torch.inference_mode(False):
            for mine, new in zip(self.tensors, self._quantized(parameter), strict=True):
                if mine.data_ptr() != new.data_ptr():  # one that was housed here is its own place
                    mine.copy_(new)
        self.house(parameter)
        self._remember(parameter)
        count("weights_refreshed")

    def house(self, parameter: Any) -> None:
        """If `parameter` is packed already, these tensors are its own from now on."""
        if hasattr(parameter, "planes"):
            parameter.move_to(self.tensors[:-1], self.tensors[-1])

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

    def _quantized(self, parameter: Any) -> tuple[Tensor, ...]:
        if hasattr(parameter, "planes"):
            return *parameter.planes, parameter.scale
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


class Planes:
    """A set of planes and scales: the packed weights of one or more parameters, side by side along N.

    Rows of all weights but the last must fill whole indices of the layout (packing.rows_per_index).
    """

    made_of: type[PackedWeight] = PackedWeight

    def __init__(self, parameters: Sequence[Tensor], spec: PackSpec, names: Sequence[str]) -> None:
        self.spec = spec
        self.weights = [self.made_of(parameter, spec, name) for parameter, name in zip(parameters, names, strict=True)]
        self.tensors = self.weights[0].tensors
        if len(parameters) > 1:
            self._join()
            for weight, parameter in zip(self.weights, parameters, strict=True):
                weight.house(parameter)

    def belong_to(self, parameters: Sequence[Tensor]) -> bool:
        """Whether they were made from these very parameters, fresh or not."""
        return len(parameters) == len(self.weights) and all(map(PackedWeight.belongs_to, self.weights, parameters))

    def may_pass_to(self, parameters: Sequence[Tensor]) -> bool:
        """Whether every parameter that they were made from is the one given in its place, or gone."""
        return all(w.is_orphan or w.belongs_to(p) for w, p in zip(self.weights, parameters, strict=True))

    def _join(self) -> None:
        with torch.inference_mode(False):
            *planes, _ = self.weights[0].tensors
            dims = *(0 for _ in planes), 1
            wholes = []
            parts = []
            for tensors, dim in zip(zip(*(w.tensors for w in self.weights), strict=True), dims, strict=True):
                wholes.append(torch.cat(tensors, dim))
                parts.append(wholes[-1].split([tensor.shape[dim] for tensor in tensors], dim))
        self.tensors = tuple(wholes)
        for weight, *rows in zip(self.weights, *parts, strict=True):
            weight.tensors = tuple(rows)


# For every parameter, the planes with its rows.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_planes(
    parameters: Sequence[Tensor], spec: PackSpec, names: Sequence[str], old: Planes | None = None
) -> Planes:
    """The planes of `parameters`: of an earlier graph (another shape, prefill and decode), or `old` ones, or made now.

    `old` are planes that these parameters may take over: those of parameters that are gone.
    Raises ValueError if a parameter cannot be quantized.
    """
    for planes in _packed.get(parameters[0], ()):
        if planes.spec == spec and planes.belong_to(parameters):
            return planes
    planes = old if old is not None and old.may_pass_to(parameters) else Planes(parameters, spec, names)
    for parameter in parameters:
        others = [o for o in _packed.get(parameter, ()) if o is not planes and not any(w.is_orphan for w in o.weights)]
        _packed[parameter] = [*others, planes]
    return planes


class WeightInput:
    """The place of one set of planes among the inputs of a compiled graph, and of its parameters among Dynamo's."""

    def __init__(self, positions: Sequence[int], planes: Planes) -> None:
        self.positions = tuple(positions)
        self._use(planes)

    def tensors(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(*planes, scale) of the parameters that this call passes among `args`, refreshed if they have changed."""
        for weight, position in self._places:
            if not weight.is_fresh(args[position]):
                self._catch_up([args[position] for position in self.positions])
                break
        return self.planes.tensors

    def _use(self, planes: Planes) -> None:
        self.planes = planes
        self._places = tuple(zip(planes.weights, self.positions, strict=True))

    def _catch_up(self, parameters: list[Tensor]) -> None:
        planes = self.planes
        if not planes.belong_to(parameters):
            # Dynamo runs one graph for all layers that look alike: then each has its own planes. Only the successor of a
            # parameter that is gone takes over its planes.
            self._use(packed_planes(parameters, planes.spec, [w.name for w in planes.weights], planes))
        for weight, parameter in zip(self.planes.weights, parameters, strict=True):
            if not weight.is_fresh(parameter):
                start = time.perf_counter()
                weight.refresh(parameter)
                if parameter.is_cuda:
                    torch.cuda.synchronize(parameter.device)
                refreshed(weight.name, time.perf_counter() - start)


def refresh(model: torch.nn.Module) -> None:
    """Quantize the weights of `model` anew at their next use; only needed after writing in place through `.data`."""
    for parameter in model.parameters():
        for planes in _packed.get(parameter, ()):
            for weight in planes.weights:
                if weight.belongs_to(parameter):
                    weight.invalidate()


def forget_weights() -> None:
    """Forget the planes of all parameters; graphs that are still alive keep theirs."""
    _packed.clear()
