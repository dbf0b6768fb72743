"""Packed weights: made once per parameter, shared by every graph that reads it, and never stale.

Weights that multiply the same input lie side by side in one set of planes, so that one matmul reads them all (merging.py);
each still follows its own parameter, in its own rows. A weight that one graph has in such a set and another graph has alone,
or in another set, is packed for each. A parameter that is packed already (a PackedTensor) is moved into the set, and has its
own planes there from then on: it takes no more memory than before.

The parameter stays the user's own, and they may change it after compilation: `copy_`, `load_state_dict`, an optimizer step,
`p.data = ...`, `module.weight = nn.Parameter(...)`. None of that fails a Dynamo guard, so every call asks each packed weight
whether it still belongs to what it was made from: the same tensor, the same storage, the same version. If not, the new
values are quantized. What a call needs to know is one object that never changes: a call that has it is right to its end,
whatever other threads write meanwhile.

The planes are an attribute of their parameters and live exactly as long: graphs, which Dynamo keeps, do not hold them. There
is no weak reference to a parameter either, because `Module._apply` swaps tensors and refuses those that have one.

Some changes leave no trace in PyTorch: writing in place through `.data`, as in `p.data.mul_(2)` or the `p.data += delta` of
some LoRA merges (autograd's own check misses it, too), through NumPy, DLPack or the storage, or by a kernel that raises no
version. For those there is `refresh(model)`. Fused optimizers are such kernels, so every optimizer's step marks what it has
stepped.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp6_compile.formats import get_format
from fp6_compile.kernels.cpu import quantize as cpu
from fp6_compile.packing import CPU, pack
from fp6_compile.quantize import quantize
from fp6_compile.report import Refresh, count, publish_refresh

# A weight that is written while it is read is read again, so often.
_ATTEMPTS = 10

# Held while weights are quantized, never by a call that finds all of them fresh.
_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # the thread that held it is not in the child


@dataclass(frozen=True)
class PackSpec:
    """How a parameter is packed. `transposed`: it is [K, N], as in `x @ W`, and is packed the other way round."""

    format: str
    group_size: int | None
    scale: str
    layout: str
    transposed: bool
    device: torch.device


class Stamp(NamedTuple):
    """The state of a parameter: which tensor it is, how often it was written, in which storage it is and where."""

    owner: int
    version: int
    storage: int
    address: int
    # Weak, or the float weight could never be freed. But held: while it is, no other storage can get its identity.
    reference: StorageWeakRef

    @classmethod
    def of(cls, parameter: Tensor) -> Stamp:
        storage = StorageWeakRef(parameter.untyped_storage())
        return cls(id(parameter), parameter._version, storage.cdata, parameter.data_ptr(), storage)

    def fits(self, parameter: Tensor) -> bool:
        """Whether `parameter` is still in this state."""
        return self[:4] == Stamp.of(parameter)[:4]


class Packing(NamedTuple):
    """Planes at one moment: the tensors (*planes, scale) of all rows, those of each parameter, and what they are made of."""

    tensors: tuple[Tensor, ...]
    rows: tuple[tuple[Tensor, ...], ...]
    stamps: tuple[Stamp, ...]


class Planes:
    """A set of planes and scales: the packed weights of one or more parameters, side by side along N.

    Rows of all weights but the last must fill whole indices of the layout (packing.rows_per_index). Rows that are fresh in
    `old` are copied from there.
    Raises ValueError if a parameter cannot be quantized.
    """

    def __init__(
        self, parameters: Sequence[Tensor], spec: PackSpec, names: Sequence[str], old: Packing | None = None
    ) -> None:
        self.spec = spec
        self.names = tuple(names)
        stamps, rows = self._read(parameters, old, "weights_packed")
        self.packing = Packing(*_joined(rows), stamps)
        self._house(parameters)

    @property
    def is_in_place(self) -> bool:
        """Whether new values go where the old ones were: CUDA graphs have recorded addresses, threads on a CPU read on."""
        return self.spec.device.type != "cpu"

    def belong_to(self, parameters: Sequence[Tensor]) -> bool:
        """Whether they were made from these very parameters, fresh or not."""
        return [stamp.owner for stamp in self.packing.stamps] == [id(parameter) for parameter in parameters]

    def refresh(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """Quantize anew what has changed; seconds by name. If one is refused (NaN), all stay as they were."""
        start, old = time.perf_counter(), self.packing
        stale = [n for n, s, p in zip(self.names, old.stamps, parameters, strict=True) if not s.fits(p)]
        if not stale:
            return {}
        stamps, rows = self._read(parameters, old, "weights_refreshed")
        if self.is_in_place:
            _fill(old.rows, rows, self.spec.device)
            self.packing = old._replace(stamps=stamps)
        else:
            self.packing = Packing(*_joined(rows), stamps)
        self._house(parameters)
        return dict.fromkeys(stale, (time.perf_counter() - start) / len(stale))

    def forget(self, parameter: Tensor) -> None:
        """Make what was made of `parameter` stale."""
        stamps = (s._replace(version=-1) if s.owner == id(parameter) else s for s in self.packing.stamps)
        self.packing = self.packing._replace(stamps=tuple(stamps))

    def _read(
        self, parameters: Sequence[Tensor], old: Packing | None, event: str
    ) -> tuple[tuple[Stamp, ...], list[tuple[Tensor, ...]]]:
        """Stamp and tensors of each parameter: those that it has in `old`, or new ones."""
        known = [(None, ())] * len(parameters) if old is None else list(zip(old.stamps, old.rows, strict=True))
        stamps, rows = [], []
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be refreshed outside that mode
            for parameter, name, (stamp, tensors) in zip(parameters, self.names, known, strict=True):
                if stamp is None or not stamp.fits(parameter):
                    stamp, tensors = self._quantized(parameter, name)
                    if event == "weights_refreshed" or not is_packed(parameter):
                        count(event)
                stamps.append(stamp)
                rows.append(tensors)
        return tuple(stamps), rows

    def _quantized(self, parameter: Any, name: str) -> tuple[Stamp, tuple[Tensor, ...]]:
        """Of one state of the parameter, even if somebody writes it meanwhile: then of the one after."""
        for _ in range(_ATTEMPTS):
            stamp = Stamp.of(parameter)
            if is_packed(parameter):
                return stamp, (*parameter.planes, parameter.scale)
            value = parameter.detach().clone()
            try:
                tensors = quantized(value.t() if self.spec.transposed else value, self.spec)
            except ValueError as error:
                raise ValueError(f"fp6: cannot quantize {name}: {error}") from error
            # The version counts writes that have ended: one that goes on shows in the values.
            if stamp.fits(parameter) and torch.equal(value, parameter):
                break
        return stamp, tensors

    def _house(self, parameters: Sequence[Any]) -> None:
        """Parameters that are packed already have their planes here from now on."""
        for parameter, tensors in zip(parameters, self.packing.rows, strict=True):
            if len(parameters) > 1 and is_packed(parameter):
                parameter.move_to(tensors[:-1], tensors[-1])


def is_packed(parameter: Tensor) -> bool:
    """Whether it is a PackedTensor; by what it has, because tensor.py is above this file."""
    return hasattr(parameter, "planes")


def quantized(weight: Tensor, spec: PackSpec) -> tuple[Tensor, ...]:
    """(*planes, scale) of `weight` [N, K]. Raises ValueError as quantize.quantize does."""
    fmt = get_format(spec.format)
    if spec.layout == CPU and spec.scale == "absmax" and (fast := cpu.quantize(weight, fmt, spec.group_size)):
        return fast
    codes, scale = quantize(weight, fmt, spec.group_size, spec.scale)
    return *pack(codes, fmt, spec.layout), scale


def _joined(rows: list[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...]]:
    """The tensors of all rows side by side, and the rows of each in them."""
    if len(rows) == 1:
        return rows[0], tuple(rows)
    dims = *(0 for _ in rows[0][:-1]), 1
    wholes = tuple(torch.cat(tensors, dim) for tensors, dim in zip(zip(*rows, strict=True), dims, strict=True))
    parts = [
        whole.split([tensors[i].shape[dim] for tensors in rows], dim)
        for i, (whole, dim) in enumerate(zip(wholes, dims, strict=True))
    ]
    return wholes, tuple(zip(*parts, strict=True))


def _fill(old: Sequence[tuple[Tensor, ...]], new: Sequence[tuple[Tensor, ...]], device: torch.device) -> None:
    """Write the rows in the place of the old ones, when no stream reads those any more."""
    torch.cuda.synchronize(device)
    for mine, theirs in zip((t for rows in old for t in rows), (t for rows in new for t in rows), strict=True):
        if mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)
    torch.cuda.synchronize(device)


class _Table:
    """The planes of one parameter, by how and with which others it is packed, and the calls that it is the first weight of.

    Not part of the parameter where that is pickled or copied.
    """

    def __init__(self) -> None:
        self.planes: dict[tuple[PackSpec, tuple[str, ...]], Planes] = {}
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
    """All planes that have rows of `parameter`."""
    table = getattr(parameter, "_fp6_table", None)
    return list(dict.fromkeys(table.planes.values())) if isinstance(table, _Table) else []


def packed_planes(parameters: Sequence[Tensor], spec: PackSpec, names: Sequence[str]) -> Planes:
    """The planes of `parameters`, fresh or not: of an earlier graph (another shape, prefill and decode), or made now.

    Raises ValueError if a parameter cannot be quantized.
    """
    key = spec, tuple(names)
    with _lock:
        tables = [_table(parameter).planes for parameter in parameters]
        known = (planes for table in tables for planes in table.values())
        planes = next((p for p in known if p.spec == spec and p.belong_to(parameters)), None)
        if planes is None:  # some of the parameters may have been packed with others, which these replace
            old = next((table[key].packing for table in tables if key in table), None)
            planes = Planes(parameters, spec, names, old)
        for table in tables:
            table[key] = planes
        return planes


class _Call(NamedTuple):
    """What a call whose weights have not changed needs: the tensors, and what to compare with which of its arguments."""

    checks: list[tuple[int, int, int, int, int]]  # position, then the first four of a Stamp
    tensors: list[Tensor]
    stamps: list[Stamp]  # only to be held


class WeightInputs:
    """The sets of planes among the inputs of a compiled graph, and their parameters among Dynamo's inputs."""

    def __init__(self) -> None:
        self.specs: list[PackSpec] = []
        self._sets: list[tuple[tuple[int, ...], tuple[str, ...]]] = []

    def add(self, positions: Sequence[int], planes: Planes) -> None:
        """One more set, and where its parameters are among Dynamo's inputs."""
        self._sets.append((tuple(positions), planes.names))
        self.specs.append(planes.spec)

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
                or address != parameter.data_ptr()
                or owner != id(parameter)
            ):
                return self._catch_up(args)
        return tensors

    def _catch_up(self, args: Sequence[Any]) -> list[Tensor]:
        """Dynamo runs one graph for all layers that look alike, and each has planes of its own."""
        call = _Call([], [], [])
        seconds: dict[str, float] = {}
        with _lock:
            first = _table(args[self._sets[0][0][0]])
            first.calls.pop(self, None)  # it holds the old planes
            for (positions, names), spec in zip(self._sets, self.specs, strict=True):
                parameters = [args[position] for position in positions]
                planes = packed_planes(parameters, spec, names)
                seconds |= planes.refresh(parameters)
                tensors, _, stamps = planes.packing
                call.tensors.extend(tensors)
                call.stamps.extend(stamps)
                call.checks.extend((position, *stamp[:4]) for position, stamp in zip(positions, stamps, strict=True))
            first.calls[self] = call
        if seconds:
            publish_refresh(Refresh(seconds))
        return call.tensors


def refresh(model: torch.nn.Module) -> None:
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
    """Drop the planes of all parameters."""
    for table in list(_tables):
        table.planes.clear()
        table.calls.clear()
