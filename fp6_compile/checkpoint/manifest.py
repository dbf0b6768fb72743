"""What a checkpoint folder holds, and everything that can be wrong with it.

    model.safetensors.index.json                  Hugging Face's index: which tensor is in which shard
    model-00001-of-00002-<hash>.safetensors       tensors, and what they are: metadata.py
    fp6-buffers-<hash>.safetensors                buffers that are not persistent, if there are any; the index names it
    config.json                                   of a transformers model; fp6_compile.load does not read it

A folder of transformers' `save_pretrained` has the same shards under other names, or one model.safetensors and no index.
The packed weight "model.fc.weight" is the tensors "model.fc.weight_w4", "_w2" and "_scale": canonical bit planes
(packing.py), which are the same for all devices. All other tensors are stored as they are. Any reader of safetensors can
open them.

`Manifest.read` checks the folder as a whole, every tensor of it, before anyone loads anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp6_compile.checkpoint import version1
from fp6_compile.checkpoint.metadata import open_shard, read_metadata
from fp6_compile.checkpoint.packed_weight import CheckpointError, PackedWeight
from fp6_compile.storage.files import member, read_json, reason, short
from fp6_compile.storage.safetensors import DTYPES, Entry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# In the index's metadata: the file of the buffers that are not persistent.
BUFFERS = "fp6_buffers"


@dataclass
class Manifest:
    """A checked checkpoint. `plain` and `weights` by parameter name, `tied` names by the name that is stored."""

    folder: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> dict[str, Entry]:
        """The tensors that are stored as they are."""
        stored = {tensor for name, weight in self.weights.items() for tensor in weight.tensors(name)}
        return {name: entry for name, entry in self.entries.items() if name not in stored}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(e.shape).numel() * DTYPES[e.dtype].itemsize for e in self.entries.values())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder whose every tensor is as it was written. Raises CheckpointError if one is not."""
        found = cls(folder)
        if os.path.lexists(folder / version1.INDEX):
            for name, entries, weights, tied in version1.shards(folder):
                found._add(name, entries, weights, tied)
        else:
            found._read()
        found._check()
        return found

    def _read(self) -> None:
        names, hashes, where = files(self.folder), dict[str, str](), dict[str, str]()
        for name in names.shards + names.buffers:
            entries, about = _open(self.folder, name)
            where |= dict.fromkeys(entries, name) if name in names.shards else {}
            self._add(name, entries, {}, {})
            for known, key in ((self.weights, "weights"), (self.tied, "tied"), (hashes, "sha256")):
                _merge(known, about[key], name)
        if names.where is not None and names.where != where:
            name = next(iter(sorted(names.where.items() ^ where.items())))[0]
            raise CheckpointError(f"fp6: {INDEX} and its files disagree on where {short(name)} is")
        _check_hashes(self.entries, hashes)

    def _add(self, file: str, entries: Any, weights: Any, tied: Any) -> None:
        for known, new in ((self.entries, entries), (self.weights, weights), (self.tied, tied)):
            if twice := known.keys() & new.keys():
                raise CheckpointError(f"fp6: {short(sorted(twice)[0])} is in {short(file)} and in another shard")
            known |= new
        for entry in entries.values():
            if entry.dtype not in DTYPES:
                raise CheckpointError(
                    f"fp6: {short(entry.name)} is of dtype {entry.dtype}, which this version cannot read"
                )

    def _check(self) -> None:
        for name, weight in self.weights.items():
            _check_weight(name, weight, self.entries)
        names = self.weights.keys() | self.entries.keys()
        for name, target in self.tied.items():
            if not isinstance(target, str) or target not in names or name in names:
                raise CheckpointError(
                    f"fp6: {short(name)} is tied to {short(target)!r}, which is not there, or is there itself"
                )


@dataclass(frozen=True)
class Files:
    """The names of a folder's files, and the file of each tensor, where an index says it."""

    shards: list[str]
    buffers: list[str]
    where: Mapping[str, str] | None


def files(folder: Path) -> Files:
    """The files that hold the tensors of a folder: what transformers reads. CheckpointError if there are none."""
    if os.path.lexists(folder / SINGLE):
        return Files([SINGLE], [], None)
    try:
        index = read_json(member(folder, INDEX))
    except FileNotFoundError as error:
        raise CheckpointError(f"fp6: {folder} is not a checkpoint: it has no {SINGLE} and no {INDEX}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"fp6: {folder} is not a checkpoint: cannot read {INDEX}: {reason(error)}") from error
    where = index.get("weight_map") if isinstance(index, dict) else None
    said = index.get("metadata", {}) if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"fp6: {INDEX} has no table 'weight_map' of file names")
    buffers = said.get(BUFFERS) if isinstance(said, dict) else None
    return Files(sorted(set(where.values())), [] if buffers is None else [buffers], where)


def is_packed(folder: Path) -> bool:
    """Whether a folder says that it is a checkpoint of this package, or was one of version 1. Reads headers alone."""
    if os.path.lexists(folder / version1.INDEX):
        return True
    try:
        return any(True for _ in shard_metadata(folder))
    except CheckpointError:
        return False


def shard_metadata(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, what its metadata says) of each shard, from the headers alone. Raises CheckpointError."""
    for name in files(folder).shards:
        yield name, read_metadata(_entries(folder, name)[1], name)


def _entries(folder: Path, name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    file = open_shard(folder, name, INDEX)
    try:
        return file.entries()
    except ValueError as error:
        raise CheckpointError(f"fp6: {error}") from error


def _open(folder: Path, name: str) -> tuple[dict[str, Entry], dict[str, Any]]:
    found, said = _entries(folder, name)
    return found, read_metadata(said, name)


def _merge(known: dict[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Add what a shard's metadata says; shards may say the same."""
    for name, value in new.items():
        if known.setdefault(name, value) != value:
            raise CheckpointError(f"fp6: {where} and another shard disagree on {short(name)}")


def _check_hashes(entries: Mapping[str, Entry], hashes: Mapping[str, str]) -> None:
    if missing := sorted(hashes.keys() - entries.keys()):
        raise CheckpointError(f"fp6: {short(missing[0])} is missing")
    for name, entry in entries.items():
        if name not in hashes:
            raise CheckpointError(f"fp6: {entry.file.path.name} has {short(name)}, of which its metadata knows nothing")
        if entry.sha256() != hashes[name]:
            raise CheckpointError(f"fp6: {short(name)} in {entry.file.path.name} is damaged: its SHA-256 is another")


def _check_weight(name: str, weight: PackedWeight, entries: Mapping[str, Entry]) -> None:
    for stored, (dtype, shape) in weight.tensors(name).items():
        entry = entries.get(stored)
        if entry is None:
            raise CheckpointError(f"fp6: {short(stored)} is missing")
        if (DTYPES.get(entry.dtype), entry.shape) != (dtype, shape):
            raise CheckpointError(
                f"fp6: {short(entry.name)} is {entry.dtype} of shape {list(entry.shape)}, "
                f"expected {dtype} of {list(shape)}"
            )
    scale = entries[stored].read()
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise CheckpointError(f"fp6: {short(stored)} has values that are NaN, infinite or not positive")
