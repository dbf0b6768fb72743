"""What a packed model says of itself: in the metadata of its shards, and in transformers' config.json.

A shard's metadata has, under "fp6", a JSON text:

    {"version": 2, "layout": "planes.v1",
     "weights": {"model.fc.weight": {"format": "e3m2", "group_size": 64, "shape": [128, 256], "dtype": "float16"}},
     "tied": {"lm_head.weight": "model.embed.weight"},
     "sha256": {"model.fc.weight_w4": "...", ...},      of each tensor, with its dtype and shape
     "digest": "..."}                                   SHA-256 of the text without it

A table may speak of tensors of other shards too: transformers gives all shards of a model the same metadata.

config.json has what readers must know before they open a shard:

    {"quant_method": "fp6", "version": 2, "format": "e3m2", "group_size": 64,
     "modules_to_not_convert": ["lm_head"],             every linear that is not packed
     "module_formats": {"model.fc": {"format": "e2m3", "group_size": null}}}
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fp6_compile.checkpoint.packed_weight import CheckpointError, PackedWeight
from fp6_compile.formats import DEFAULT
from fp6_compile.layouts.packing import PLANES
from fp6_compile.packed.slots import Slot
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.storage.files import member, parse_json, reason, short
from fp6_compile.storage.safetensors import File

VERSION = 2
# Of version 1 (version1.py), and of this one.
READABLE = (1, VERSION)


def tables(found: list[Slot]) -> tuple[dict[str, PackedWeight], dict[str, str]]:
    """The packed weights of a model's slots by name, and which names are tied to which."""
    packed = ((slot.names[0], slot.tensor) for slot in found)
    weights = {name: PackedWeight.of(tensor) for name, tensor in packed if isinstance(tensor, PackedTensor)}
    return weights, {alias: slot.names[0] for slot in found for alias in slot.names[1:]}


def open_shard(folder: Path, name: str, index: str) -> File:
    """The file `name` of a folder, which its `index` names. Raises CheckpointError if it is not in the folder itself."""
    try:
        path = member(folder, name)
        if path.name != name:
            raise ValueError("it is not in the folder itself")
        return File(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"fp6: {short(name)}, which {index} names, is missing: {reason(error)}") from error


def metadata(weights: Mapping[str, PackedWeight], tied: Mapping[str, str], sha256: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a shard whose tensors have the hashes `sha256`; "format" is for other readers of safetensors files."""
    described = {name: weight.to_json() for name, weight in weights.items()}
    about = {"version": VERSION, "layout": PLANES, "weights": described, "tied": dict(tied), "sha256": dict(sha256)}
    return {"format": "pt", "fp6": json.dumps({**about, "digest": digest(about)})}


def read_metadata(said: Mapping[str, str], where: str) -> dict[str, Any]:
    """The table that `metadata` wrote to the shard `where`, its weights parsed.

    Raises CheckpointError for any other.
    """
    try:
        about = parse_json(said.get("fp6", "null"), f"the metadata of {where}")
    except ValueError as error:
        raise CheckpointError(f"fp6: {error}") from error
    check_version(about, where, VERSION)
    claimed = about.pop("digest", None)
    if claimed != digest(about):
        raise CheckpointError(f"fp6: the metadata of {where} is damaged: its SHA-256 is not the one it gives")
    for key in ("weights", "tied", "sha256"):
        table(about, key, where)
    weights = {name: PackedWeight.from_json(name, weight) for name, weight in about["weights"].items()}
    return {**about, "weights": weights}


def check_version(said: Any, where: str, wanted: int) -> None:
    """Raises CheckpointError unless a table is of the version `wanted` and speaks of canonical bit planes."""
    version = said.get("version") if isinstance(said, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"fp6: {where} gives no version: not written by fp6_compile, or damaged")
    if version not in READABLE:
        raise CheckpointError(
            f"fp6: {where} is of version {short(version)}, this fp6_compile reads versions {READABLE[0]} to {VERSION}; "
            "use the one that wrote it, or quantize the model anew"
        )
    if version != wanted:
        raise CheckpointError(f"fp6: {where} is of version {version}, in a folder of version {wanted}")
    if said.get("layout") != PLANES:
        raise CheckpointError(
            f"fp6: {where} has planes in layout {short(said.get('layout'))!r}, this fp6_compile reads {PLANES!r}"
        )


def table(said: Any, key: str, where: str) -> dict[str, Any]:
    """The table `key` of a parsed text. CheckpointError if there is none."""
    found = said.get(key)
    if not isinstance(found, dict):
        raise CheckpointError(f"fp6: {where} has no table {key!r}")
    return found


def digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a packed model: the format that most of its weights have, and all exceptions by name."""
    modules = list(model.named_modules(remove_duplicate=False))
    weights = {name: module._parameters.get("weight") for name, module in modules}
    packed = {n: (w.spec.format, w.spec.group_size) for n, w in weights.items() if isinstance(w, PackedTensor)}
    format, group_size = Counter(packed.values()).most_common(1)[0][0] if packed else (DEFAULT, None)
    others = {name: how for name, how in packed.items() if how != (format, group_size)}
    return {
        **{"quant_method": "fp6", "version": VERSION, "format": format, "group_size": group_size},
        "modules_to_not_convert": [n for n, m in modules if isinstance(m, nn.Linear) and n not in packed],
        "module_formats": {name: {"format": fmt, "group_size": size} for name, (fmt, size) in others.items()},
    }
