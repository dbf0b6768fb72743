"""Packed weights: made once per parameter, shared by every graph that reads it, and never stale.

Weights that multiply the same input lie side by side in one set of planes, so that one matmul reads them all (merging.py);
each still follows its own parameter, in its own rows. A weight that one graph has in such a set and another graph has alone,
or in another set, is packed for each. A parameter that is packed already (a PackedTensor) is moved into the set, and has its
own planes there from then on: it takes no more memory than before.

The parameter stays the user's own, and they may change it after compilation: `copy_`, `load_state_dict`, an optimizer step,
`p.data = ...`, `module.weight = nn.Parameter(...)`. None of that fails a Dynamo guard, so every call asks each packed weight
whether it still belongs to what it was made from: the same tensor, the same storage, the same version. If not, the new
values are quantized. What a call has to know lies in one `Packing`, which never changes: a call takes the newest one, reads it
to the end, and is right whatever other threads write meanwhile.

The planes are an attribute of their parameters and live exactly as long: graphs, which Dynamo keeps, do not hold them. There
is no weak reference to a parameter either, because `Module._apply` swaps tensors and refuses those that have one.

Some kinds of change leave no trace in PyTorch: writing in place through `.data`, as in `p.data.mul_(2)` or the
`p.data += delta` of some LoRA merges (autograd's own check misses it too), through NumPy, DLPack or the storage, or by a kernel
that bypasses the dispatcher. For those there is `refresh(model)`. Fused optimizers are such kernels: every optimizer's step
marks what it has stepped.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp6_compile.formats import get_format
from fp6_compile.kernels.cpu import quantize as cpu
from fp6_compile.packing import CPU, pack
from fp6_compile.quantize import quantize
from fp6_compile.report import count

_ATTRIBUTE = "_fp6_planes"
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


class Stamp:
    """The state of a parameter: which tensor it is, in which storage, and how often it was written."""

    __slots__ = ("address", "owner", "storage", "version")

    def __init__(self, parameter: Tensor) -> None:
        self.owner = id(parameter)
        self.version = parameter._version
        # Weak, or the float weight could never be freed. But held: while it is, no other storage can get its identity.
        self.storage = StorageWeakRef(parameter.untyped_storage())
        self.address = parameter.data_ptr()

    def fits(self, parameter: Tensor) -> bool:
        """Whether `parameter` is still in this state. Runs for every weight of every call: keep it small."""
        return (
            self.owner == id(parameter)
            and self.version == parameter._version
            and self.storage.cdata == parameter.untyped_storage()._cdata
            and self.address == parameter.data_ptr()
        )


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
        for stamp in self.packing.stamps:
            if stamp.owner == id(parameter):
                stamp.version = -1

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
            stamp = Stamp(parameter)
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


class _Table(dict[str, Planes]):
    """The planes of one parameter, by key. Not part of it where it is pickled or copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


_tables: WeakValueDictionary[int, _Table] = WeakValueDictionary()


def planes_of(parameter: Tensor) -> list[Planes]:
    """All planes that have rows of `parameter`."""
    return list(dict.fromkeys(getattr(parameter, _ATTRIBUTE, {}).values()))


def packed_planes(parameters: Sequence[Tensor], spec: PackSpec, names: Sequence[str]) -> Planes:
    """The planes of `parameters`, fresh or not: of an earlier graph (another shape, prefill and decode), or made now.

    Raises ValueError if a parameter cannot be quantized.
    """
    key = _key(spec, names)
    with _lock:
        tables = [_table(parameter) for parameter in parameters]
        known = (planes for table in tables for planes in table.values())
        planes = next((p for p in known if p.spec == spec and p.belong_to(parameters)), None)
        if planes is None:  # some of the parameters may have been packed with others, which these replace
            old = next((table[key].packing for table in tables if key in table), None)
            planes = Planes(parameters, spec, names, old)
        for table in tables:
            table[key] = planes
        return planes


def _key(spec: PackSpec, names: Sequence[str]) -> str:
    return repr((spec, tuple(names)))  # a string, because a string knows its hash: it is looked up at every call


def _table(parameter: Tensor) -> _Table:
    table = getattr(parameter, _ATTRIBUTE, None)
    if not isinstance(table, _Table):
        table = _Table()
        setattr(parameter, _ATTRIBUTE, table)
        _tables[id(table)] = table
    return table


class WeightInput:
    """The place of one set of planes among the inputs of a compiled graph, and of its parameters among Dynamo's."""

    def __init__(self, positions: Sequence[int], planes: Planes) -> None:
        self.positions = tuple(positions)
        self.spec, self.names = planes.spec, planes.names
        self._key = _key(planes.spec, planes.names)

    def tensors(self, args: Sequence[Tensor], seconds: dict[str, float]) -> tuple[Tensor, ...]:
        """(*planes, scale) of the parameters that this call passes among `args`, refreshed if they have changed.

        `seconds` gets what each refreshed weight took. Raises ValueError if new values cannot be quantized.
        """
        positions = self.positions
        try:
            packing = getattr(args[positions[0]], _ATTRIBUTE)[self._key].packing
        except (AttributeError, KeyError):
            return self._catch_up(args, seconds)
        for stamp, position in zip(packing.stamps, positions):  # noqa: B905  (strict= costs as much as the comparison)
            if not stamp.fits(args[position]):
                return self._catch_up(args, seconds)
        return packing.tensors

    def _catch_up(self, args: Sequence[Tensor], seconds: dict[str, float]) -> tuple[Tensor, ...]:
        # Dynamo runs one graph for all layers that look alike: then each has its own planes.
        parameters = [args[position] for position in self.positions]
        with _lock:
            planes = packed_planes(parameters, self.spec, self.names)
            seconds |= planes.refresh(parameters)
            return planes.packing.tensors


def refresh(model: torch.nn.Module) -> None:
    """Quantize the weights of `model` anew at their next use; only needed after a write that leaves no trace in PyTorch."""
    _forget(model.parameters())


def _forget(parameters: Iterable[Tensor]) -> None:
    with _lock:  # a refresh that has begun would forget that it should begin again
        for parameter in parameters:
            for planes in planes_of(parameter):
                planes.forget(parameter)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers raise no version, and others' kernels need not."""
    _forget(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


register_optimizer_step_post_hook(_after_step)


def forget_weights() -> None:
    """Drop the planes of all parameters."""
    for table in list(_tables.values()):
        table.clear()
