"""Bit planes of one or more parameters, and the states of the parameters that they were made from.

A Packing never changes: new values become another one, so that its bit planes, scales and stamps always belong together.
weights.py says who asks when.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fp6_compile.formats import get_format
from fp6_compile.kernels.pack import quantized
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import count

# A weight that is written while it is read is read again, so often.
_ATTEMPTS = 10


class PlanesKey(NamedTuple):
    """What tells sets of bit planes of the same parameters apart: how they are read, how they were made, where they are.

    If `spec.transposed`, the parameter is [K, N], as in `x @ W`, and is packed the other way round.
    """

    spec: PackingSpec
    scale_method: str
    device: torch.device


class Stamp(NamedTuple):
    """The state of a parameter: which tensor it is, how often it was written, in which storage it is and where."""

    owner: int
    version: int
    storage: int
    address: int
    # Weak, or the float weight could never be freed. But held: while it is, no other storage can get its identity.
    reference: StorageWeakRef | None

    @classmethod
    def of(cls, parameter: Tensor) -> Stamp:
        storage = StorageWeakRef(parameter.untyped_storage())
        return cls(id(parameter), parameter._version, storage.cdata, Tensor.data_ptr(parameter), storage)

    def fits(self, parameter: Tensor) -> bool:
        """Whether `parameter` is still in this state."""
        return self[:4] == Stamp.of(parameter)[:4]


class Packing(NamedTuple):
    """Bit planes at one moment: (*planes, scale) of all rows, those of each parameter, and what they were made from."""

    tensors: tuple[Tensor, ...]
    rows: tuple[tuple[Tensor, ...], ...]
    stamps: tuple[Stamp, ...]


class Planes:
    """A set of bit planes and scales: the packed weights of one or more parameters, side by side along N.

    Rows of all weights but the last must fill whole indices of the layout (packing.rows_per_index). Rows that are fresh in
    `old` are copied from there.
    Raises ValueError if a parameter cannot be quantized.
    """

    def __init__(
        self, parameters: Sequence[Tensor], key: PlanesKey, names: Sequence[str], old: Packing | None = None
    ) -> None:
        self.key = key
        self.names = tuple(names)
        stamps, rows = self._read(parameters, old, "weights_packed")
        self.packing = Packing(*_joined(rows), stamps)
        self._adopt(parameters, rows)

    @property
    def is_in_place(self) -> bool:
        """Whether new values go where the old ones were: CUDA graphs have recorded addresses, threads on a CPU read on."""
        return self.key.device.type != "cpu"

    def belong_to(self, parameters: Sequence[Tensor]) -> bool:
        """Whether they were made from these very parameters, fresh or not."""
        return [stamp.owner for stamp in self.packing.stamps] == [id(parameter) for parameter in parameters]

    def refresh(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """Quantize anew what has changed; seconds by name. If one cannot be quantized (NaN), all stay as they were."""
        start, old = time.perf_counter(), self.packing
        stale = [n for n, s, p in zip(self.names, old.stamps, parameters, strict=True) if not s.fits(p)]
        if not stale:
            return {}
        stamps, rows = self._read(parameters, old, "weights_refreshed")
        if self.is_in_place:
            _fill(old.rows, rows, self.key.device)
            self.packing = old._replace(stamps=stamps)
        else:
            self.packing = Packing(*_joined(rows), stamps)
        self._adopt(parameters, rows)
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
        stamps: list[Stamp] = []
        rows: list[tuple[Tensor, ...]] = []
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be refreshed outside that mode
            for parameter, name, (stamp, tensors) in zip(parameters, self.names, known, strict=True):
                is_stale = stamp is None or not stamp.fits(parameter)
                # Tensors that are packed already cost nothing, and are known to be those of this moment.
                if stamp is None or is_stale or isinstance(parameter, PackedTensor):
                    stamp, tensors = self._quantized(parameter, name)
                if is_stale and (event == "weights_refreshed" or not isinstance(parameter, PackedTensor)):
                    count(event)
                stamps.append(stamp)
                rows.append(tensors)
        return tuple(stamps), rows

    def _quantized(self, parameter: Any, name: str) -> tuple[Stamp, tuple[Tensor, ...]]:
        """Of one state of the parameter, even if somebody writes it meanwhile: then of the one after."""
        spec = self.key.spec
        how = get_format(spec.format), spec.layout, spec.group_size, self.key.scale_method
        for _ in range(_ATTEMPTS):
            stamp = Stamp.of(parameter)
            if isinstance(parameter, PackedTensor):
                return stamp, parameter.tensors
            value = parameter.detach().clone()
            try:
                tensors = quantized(value.t() if spec.transposed else value, *how)
            except ValueError as error:
                raise ValueError(f"fp6: cannot quantize {name}: {error}") from error
            # The version counts writes that have ended: one that goes on shows in the values.
            if stamp.fits(parameter) and torch.equal(value, parameter):
                break
        return stamp, tensors

    def _adopt(self, parameters: Sequence[Any], sources: Sequence[tuple[Tensor, ...]]) -> None:
        """Let PackedTensors, which were `sources` until now, read their rows of these bit planes from now on."""
        for parameter, tensors, source in zip(parameters, self.packing.rows, sources, strict=True):
            if len(parameters) > 1 and isinstance(parameter, PackedTensor):
                parameter.move_to(tensors[:-1], tensors[-1], source)


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
    """Overwrite the old rows with the new ones, when no stream reads the old ones any more."""
    torch.cuda.synchronize(device)
    for mine, theirs in zip((t for rows in old for t in rows), (t for rows in new for t in rows), strict=True):
        if mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)
    torch.cuda.synchronize(device)
