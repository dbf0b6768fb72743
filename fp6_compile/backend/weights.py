"""Packed weights: made once per parameter, shared by every graph that reads it, and never stale.

Weights that multiply the same input lie side by side in one set of bit planes, so that one matmul reads them all
(merging.py); each still follows its own parameter, in its own rows. A weight that is in such a set in one graph, and alone
or in another set in another graph, is packed for each. A parameter that is packed already (a PackedTensor) reads its rows
of the set from then on, and its own bit planes are freed.

The parameter stays the user's own, and they may change it after compilation: `copy_`, `load_state_dict`, an optimizer step,
`p.data = ...`, `module.weight = nn.Parameter(...)`. None of that fails a Dynamo guard, so every call asks each packed weight
whether it still belongs to what it was made from: the same tensor, the same storage, the same version. If not, the new
values are quantized. All that a call needs is in one object that never changes, so that its weights are of one moment,
whatever other threads write meanwhile.

The bit planes are an attribute of their parameters and live exactly as long: graphs, which Dynamo keeps, do not hold them.
There is no weak reference to a parameter either, because `Module._apply` cannot swap tensors that have one.

Some changes leave no trace in PyTorch: writing in place through `.data`, as in `p.data.mul_(2)` or the `p.data += delta` of
some LoRA merges (autograd's own check misses it, too), through NumPy, DLPack or the storage, or by a kernel that does not
raise the version. After those, call `mark_weights_changed(model)`. Fused optimizers are such kernels, so the step of every
optimizer marks the parameters that it has stepped.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp6_compile.backend.planes import Planes, PlanesKey, Stamp
from fp6_compile.report import Refresh, publish_refresh

# Held while weights are quantized, never by a call that finds all of them fresh.
_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # the thread that held it is not in the child


class _Table:
    """The bit planes of one parameter, by how and with which others it is packed, and the calls whose first weight it is.

    Not part of the parameter where that is pickled or copied.
    """

    def __init__(self) -> None:
        self.planes: dict[tuple[PlanesKey, tuple[str, ...]], Planes] = {}
        self.calls: dict[WeightInputs, _Call] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load takes with weights_only, too


_tables: WeakSet[_Table] = WeakSet()


def _table(parameter: Tensor) -> _Table:
    table = getattr(parameter, "_fp6_table", None)
    if not isinstance(table, _Table):
        table = _Table()
        parameter._fp6_table = table  # type: ignore[attr-defined]
        _tables.add(table)
    return table


def planes_of(parameter: Tensor) -> list[Planes]:
    """All bit planes that have rows of `parameter`."""
    table = getattr(parameter, "_fp6_table", None)
    return list(dict.fromkeys(table.planes.values())) if isinstance(table, _Table) else []


def packed_planes(parameters: Sequence[Tensor], key: PlanesKey, names: Sequence[str]) -> Planes:
    """The bit planes of `parameters`, fresh or not: of an earlier graph (another shape, prefill and decode), or made now.

    Raises ValueError if a parameter cannot be quantized.
    """
    entry = key, tuple(names)
    with _lock:
        tables = [_table(parameter).planes for parameter in parameters]
        known = (planes for table in tables for planes in table.values())
        planes = next((p for p in known if p.key == key and p.belong_to(parameters)), None)
        if planes is None:  # some of the parameters may have been packed with others, which these replace
            old = next((table[entry].packing for table in tables if entry in table), None)
            planes = Planes(parameters, key, names, old)
        for table in tables:
            table[entry] = planes
        return planes


class _Call(NamedTuple):
    """What a call whose weights have not changed needs: the tensors, and what to compare with which of its arguments."""

    checks: list[tuple[int, int, int, int, int]]  # position, then the first four of a Stamp
    tensors: list[Tensor]
    stamps: list[Stamp]  # only to be held


class WeightInputs:
    """The sets of bit planes among the inputs of a compiled graph, and their parameters among Dynamo's inputs."""

    def __init__(self) -> None:
        self.keys: list[PlanesKey] = []
        self._sets: list[tuple[tuple[int, ...], tuple[str, ...]]] = []

    def add(self, positions: Sequence[int], planes: Planes) -> None:
        """One more set, and where its parameters are among Dynamo's inputs."""
        self._sets.append((tuple(positions), planes.names))
        self.keys.append(planes.key)

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        """(*planes, scale) of all sets, of the parameters that this call passes, refreshed if they have changed.

        Raises ValueError if new values cannot be quantized.
        """
        if not self._sets:
            return []
        try:
            checks, tensors, _ = args[self._sets[0][0][0]]._fp6_table.calls[self]
        except (AttributeError, KeyError):
            return self._catch_up(args)
        for position, owner, version, storage, address in checks:
            parameter = args[position]
            if (
                version != parameter._version
                or storage != parameter.untyped_storage()._cdata
                or address != Tensor.data_ptr(parameter)
                or owner != id(parameter)
            ):
                return self._catch_up(args)
        return tensors

    def _catch_up(self, args: Sequence[Any]) -> list[Tensor]:
        """Dynamo runs one graph for all layers that look alike, and each has bit planes of its own."""
        call = _Call([], [], [])
        seconds: dict[str, float] = {}
        with _lock:
            first = _table(args[self._sets[0][0][0]])
            first.calls.pop(self, None)  # it holds the old planes
            for (positions, names), key in zip(self._sets, self.keys, strict=True):
                parameters = [args[position] for position in positions]
                planes = packed_planes(parameters, key, names)
                seconds |= planes.refresh(parameters)
                tensors, _, stamps = planes.packing
                call.tensors.extend(tensors)
                call.stamps.extend(stamps)
                call.checks.extend((position, *stamp[:4]) for position, stamp in zip(positions, stamps, strict=True))
            first.calls[self] = call
        if seconds:
            publish_refresh(Refresh(seconds))
        return call.tensors


def mark_weights_changed(model: torch.nn.Module) -> None:
    """Quantize the weights of `model` anew at their next use; only needed after a write that leaves no trace in PyTorch."""
    _forget(model.parameters())


def _forget(parameters: Iterable[Tensor]) -> None:
    with _lock:  # a refresh that has begun would forget that it should begin again
        forgotten = [(planes, parameter) for parameter in parameters for planes in planes_of(parameter)]
        for planes, parameter in forgotten:
            planes.forget(parameter)
        for table in list(_tables) if forgotten else ():
            table.calls.clear()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers raise no version, and others' kernels need not."""
    _forget(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


register_optimizer_step_post_hook(_after_step)


def forget_weights() -> None:
    """Drop the bit planes of all parameters."""
    for table in list(_tables):
        table.planes.clear()
        table.calls.clear()
