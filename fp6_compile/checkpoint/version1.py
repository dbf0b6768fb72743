"""Folders of version 1, which `save` wrote until fp6_compile 0.1. They are read, and no longer written.

    fp6.json                                  version, layout, and for each shard its size and SHA-256; a SHA-256 of itself
    fp6-00001-of-00002-<sha>.safetensors      tensors; in the metadata, under "fp6", the packed weights among them:

        {"version": 1, "layout": "planes.v1", "tied": {"lm_head.weight": "model.embed.weight"},
         "weights": {"model.fc.weight": {"format": "e3m2", "group_size": 64, "shape": [128, 256], "dtype": "float16",
                                         "planes": ["w4", "w2"], "scale_dtype": "float32"}}}

The packed weight "model.fc.weight" is the tensors "model.fc.weight.w4", ".w2" and ".scale" [G, N]. Buffers that are not
persistent are stored like all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp6_compile.checkpoint.metadata import check_version, digest, open_shard, table
from fp6_compile.checkpoint.packed_weight import CheckpointError, PackedWeight
from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import plane_names
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.storage.files import member, parse_json, read_json, reason, short
from fp6_compile.storage.safetensors import Entry, File

INDEX = "fp6.json"


class Weight(PackedWeight):
    """A packed weight as version 1 stored it."""

    def tensors(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Bit planes `name.w4`, `name.w2`, ... and `name.scale` [G, N]."""
        *planes, (dtype, (n, groups)) = super().tensors(name).values()
        names = (f"{name}.{part}" for part in (*plane_names(get_format(self.spec.format)), "scale"))
        return dict(zip(names, (*planes, (dtype, (groups, n))), strict=True))

    def packed(self, planes: list[Tensor], scale: Tensor) -> PackedTensor:
        """The weight in the layout of its device, from the values of `tensors`."""
        return super().packed(planes, scale.t())

    def to_json(self) -> dict[str, Any]:
        """As it stands in a shard's metadata."""
        planes = list(plane_names(get_format(self.spec.format)))
        return {**super().to_json(), "planes": planes, "scale_dtype": "float32"}


def shards(folder: Path) -> Iterator[tuple[str, dict[str, Entry], dict[str, PackedWeight], dict[str, str]]]:
    """(file name, tensors, packed weights, tied names) of each shard, all of whose bytes are as they were written.

    Raises CheckpointError if one is not.
    """
    for name, about in _read_index(folder).items():
        found, said = _open(_check_file(folder, name, about))
        check_version(said, name, 1)
        weights = {n: Weight.from_json(n, w) for n, w in table(said, "weights", name).items()}
        yield name, found, weights, table(said, "tied", name)


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        index = read_json(member(folder, INDEX))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"fp6: cannot read {INDEX}: {reason(error)}") from error
    check_version(index, INDEX, 1)
    found = table(index, "shards", INDEX)
    claimed = index.pop("sha256", None)
    if claimed != digest(index):
        raise CheckpointError(f"fp6: {INDEX} is damaged: its SHA-256 is not the one it gives")
    return found


def _check_file(folder: Path, name: str, about: Any) -> File:
    file = open_shard(folder, name, INDEX)
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
