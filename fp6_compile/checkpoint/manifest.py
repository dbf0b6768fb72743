"""What a checkpoint folder says about itself, and everything that can be wrong with it.

    fp6.json                                  version, layout, and for each shard its size and SHA-256; a SHA-256 of itself
    fp6-00001-of-00002-<sha>.safetensors      tensors; in the metadata, under "fp6", the packed weights among them:

        {"version": 1, "layout": "planes.v1", "tied": {"lm_head.weight": "model.embed.weight"},
         "weights": {"model.fc.weight": {"format": "e3m2", "group_size": 64, "shape": [128, 256], "dtype": "float16",
                                         "planes": ["w4", "w2"], "scale_dtype": "float32"}}}

The packed weight "model.fc.weight" is the tensors "model.fc.weight.w4", ".w2" and ".scale": canonical bit planes
(packing.py), which are the same for all devices. All other tensors are stored as they are.

`Manifest.read` checks the folder as a whole, every byte of it, before anyone loads anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import PLANES, canonical_shapes, plane_names
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.storage.files import member, parse_json, read_json, reason, short
from fp6_compile.storage.safetensors import DTYPES, Entry, File, read

VERSION = 1
INDEX = "fp6.json"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}


class CheckpointError(ValueError):
    """A folder that is no checkpoint, is damaged, or does not fit the model: the message says which file or tensor."""


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight of a checkpoint: its canonical bit planes have `rows` rows and are read as `spec` says."""

    spec: PackingSpec
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        return self.rows, self.spec.k

    @property
    def dtype(self) -> torch.dtype:
        """What it is presented in."""
        return self.spec.dtype

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What is stored of it: (dtype, shape) by suffix, in order."""
        fmt, (n, k), group_size = get_format(self.spec.format), self.shape, self.spec.group_size
        shapes = canonical_shapes(fmt, n, k)
        planes = {name: (torch.uint8, shape) for name, shape in zip(plane_names(fmt), shapes, strict=True)}
        groups = 1 if group_size is None else -(-k // group_size)
        return {**planes, "scale": (torch.float32, (groups, n))}

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether it can stand for a parameter of `dtype`."""
        return dtype in _DTYPES.values()

    def to_json(self) -> dict[str, Any]:
        """As it stands in a shard's metadata."""
        spec = self.spec
        about = {"format": spec.format, "group_size": spec.group_size, "shape": list(self.shape)}
        planes = list(plane_names(get_format(spec.format)))
        return {**about, "dtype": str(self.dtype).removeprefix("torch."), "planes": planes, "scale_dtype": "float32"}

    @classmethod
    def from_json(cls, name: str, value: Any) -> PackedWeight:
        """Raises CheckpointError for anything but what `to_json` gives."""
        try:
            n, k = value["shape"]
            group_size = value["group_size"]
            weight = cls(PackingSpec(value["format"], PLANES, group_size, k, _DTYPES[value["dtype"]]), n)
            get_format(value["format"])
            sizes = [n, k, *([] if group_size is None else [group_size])]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"shape {[n, k]} and group_size {group_size} are not positive integers")
            if weight.to_json() != value:
                raise ValueError(f"expected {weight.to_json()}, found {value}")
            return weight
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"fp6: {short(name)}: not a packed weight this version can read: {type(error).__name__}: {short(error)}"
            ) from error


@dataclass(frozen=True)
class Manifest:
    """A checked checkpoint. `plain` and `weights` by parameter name, `tied` names by the name that is stored."""

    folder: Path
    entries: Mapping[str, Entry]
    weights: Mapping[str, PackedWeight]
    tied: Mapping[str, str]

    @property
    def plain(self) -> dict[str, Entry]:
        """The tensors that are stored as they are."""
        stored = {f"{name}.{suffix}" for name, weight in self.weights.items() for suffix in weight.tensors()}
        return {name: entry for name, entry in self.entries.items() if name not in stored}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(e.shape).numel() * DTYPES[e.dtype].itemsize for e in self.entries.values())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder whose every byte is as it was written. Raises CheckpointError if one is not."""
        found: dict[str, Entry] = {}
        weights: dict[str, PackedWeight] = {}
        tied: dict[str, str] = {}
        for name, about in _read_index(folder).items():
            shard = _check_file(folder, name, about)
            new, said = _open(shard)
            _check_version(said, name)
            _add(found, new, name)
            _add(weights, {n: PackedWeight.from_json(n, w) for n, w in _dict(said, "weights", name).items()}, name)
            _add(tied, _dict(said, "tied", name), name)
        _check_tensors(found, weights)
        names = weights.keys() | found.keys()
        for name, target in tied.items():
            if not isinstance(target, str) or target not in names or name in names:
                raise CheckpointError(
                    f"fp6: {short(name)} is tied to {short(target)!r}, which is not there, or is there itself"
                )
        return cls(folder, found, weights, tied)


def metadata(weights: Mapping[str, PackedWeight], tied: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a shard; "format" is for other readers of safetensors files."""
    about = {"version": VERSION, "layout": PLANES, "tied": dict(tied)}
    said = json.dumps({**about, "weights": {name: weight.to_json() for name, weight in weights.items()}})
    return {"format": "pt", "fp6": said}


def index_text(shards: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of the index file."""
    index = {"version": VERSION, "layout": PLANES, "shards": shards}
    return json.dumps({**index, "sha256": _digest(index)}, indent=1) + "\n"


def shards_of(folder: Path) -> Iterable[Path]:
    """All shards in a folder, those that no index names any more among them."""
    return folder.glob("fp6-*-of-*.safetensors*")


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        path = member(folder, INDEX)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"fp6: {folder} is not a checkpoint: cannot read {INDEX}: {reason(error)}") from error
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"fp6: {reason(error)}") from error
    _check_version(index, INDEX)
    shards = _dict(index, "shards", INDEX)
    claimed = index.pop("sha256", None)
    if claimed != _digest(index):
        raise CheckpointError(f"fp6: {INDEX} is damaged: its SHA-256 is not the one it gives")
    return shards


def _check_version(said: Any, where: str) -> None:
    version = said.get("version") if isinstance(said, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"fp6: {where} gives no version: not written by fp6_compile, or damaged")
    if version != VERSION:
        raise CheckpointError(
            f"fp6: {where} is of version {short(version)}, this fp6_compile reads version {VERSION}; "
            "use the one that wrote it, or quantize the model anew"
        )
    if said.get("layout") != PLANES:
        raise CheckpointError(
            f"fp6: {where} has planes in layout {short(said.get('layout'))!r}, this fp6_compile reads {PLANES!r}"
        )


def _check_file(folder: Path, name: str, about: Any) -> File:
    try:
        path = member(folder, name)
        if path.name != name:
            raise ValueError("it is not in the folder itself")
        file = File(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"fp6: {short(name)}, which {INDEX} names, is missing: {reason(error)}") from error
    if not isinstance(about, dict) or file.size != about.get("bytes"):
        raise CheckpointError(f"fp6: {name} has {file.size} bytes, {INDEX} says {short(about)}")
    if file.sha256() != about.get("sha256"):
        raise CheckpointError(f"fp6: {name} is damaged: its SHA-256 is not the one in {INDEX}")
    return file


def _open(shard: File) -> tuple[dict[str, Entry], Any]:
    """The tensors, and what the metadata says of them."""
    try:
        found, metadata = shard.entries()
        return found, parse_json(metadata.get("fp6", "null"), f"the metadata of {shard.path.name}")
    except ValueError as error:
        raise CheckpointError(f"fp6: {error}") from error


def _check_tensors(found: Mapping[str, Entry], weights: Mapping[str, PackedWeight]) -> None:
    for name, weight in weights.items():
        for suffix, (dtype, shape) in weight.tensors().items():
            entry = found.get(f"{name}.{suffix}")
            if entry is None:
                raise CheckpointError(f"fp6: {short(name)}.{suffix} is missing")
            if (DTYPES.get(entry.dtype), entry.shape) != (dtype, shape):
                raise CheckpointError(
                    f"fp6: {short(entry.name)} is {entry.dtype} of shape {list(entry.shape)}, "
                    f"expected {dtype} of {list(shape)}"
                )
    for entry in found.values():
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"fp6: {short(entry.name)} is of dtype {entry.dtype}, which this version cannot read")
    scales = [found[f"{name}.scale"] for name in weights]
    for entry, scale in read(scales):
        if not (scale.isfinite().all() and (scale > 0).all()):
            raise CheckpointError(f"fp6: {short(entry.name)} has values that are NaN, infinite or not positive")


def _add(known: dict[str, Any], new: Mapping[str, Any], where: str) -> None:
    if twice := known.keys() & new.keys():
        raise CheckpointError(f"fp6: {short(sorted(twice)[0])} is in {where} and in another shard")
    known |= new


def _dict(said: Any, key: str, where: str) -> dict[str, Any]:
    found = said.get(key)
    if not isinstance(found, dict):
        raise CheckpointError(f"fp6: {where} has no table {key!r}")
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
