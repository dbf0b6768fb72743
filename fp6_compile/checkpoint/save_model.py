"""`save`: a packed model in a folder that `fp6_compile.load`, transformers and vLLM read. What is in it: manifest.py.

Each shard is written under a name of its own, and last of all, in one atomic step, the index that names them. Killed at any
moment it leaves the old index with its shards, or the new one with its; files of others, such as a tokenizer, stay as they
are. (Exchanging whole folders would lose those, and needs a system call that not all systems have.) Shards that no index
names are removed by the next save: one writer at a time.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile.checkpoint import version1
from fp6_compile.checkpoint.manifest import BUFFERS, INDEX, SINGLE, shard_metadata
from fp6_compile.checkpoint.metadata import metadata, quantization_config, tables
from fp6_compile.checkpoint.packed_weight import CheckpointError, PackedWeight
from fp6_compile.packed.slots import Slot, slots
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import progress
from fp6_compile.storage.safetensors import safetensors
from fp6_compile.storage.writing import replace, sync_folder, write

_SHARD_BYTES = 4 << 30
# What `save` itself calls its files, of this version and of version 1.
OURS = re.compile(r"(model-\d+-of-\d+-|fp6-buffers-|fp6-\d+-of-\d+-)[0-9a-f]*\.safetensors|(model|fp6)-.*\.partial")


def save(model: nn.Module, folder: str | os.PathLike[str], *, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write all parameters and buffers of `model` to `folder`, packed ones in canonical bit planes. Atomic.

    Of a transformers model config.json is written, too: `from_pretrained` and vLLM read such a folder. Buffers that are not
    persistent go into a file of their own: a model that is made on the meta device has no other source of them.

    Raises:
        ValueError: tensors on the meta device, of a subclass other than PackedTensor, or of a dtype that safetensors has
            not; a module with extra state; a folder that holds weights of another kind. The folder is then as it was.
        ImportError: no safetensors library.
    """
    safetensors()
    model, folder = getattr(model, "_orig_mod", model), Path(folder)
    _check_can_be_saved(model)
    old, found = _replaced(folder), slots(model)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split([slot for slot in found if slot.is_persistent], shard_bytes)
    where: dict[str, str] = {}
    for number, shard in enumerate(progress(shards, "fp6: saving"), 1):
        name = _write(folder, f"model-{number:05}-of-{len(shards):05}", shard)
        where |= dict.fromkeys(shard.layout, name)
    about: dict[str, Any] = {"total_size": sum(shard.bytes for shard in shards)}
    if buffers := [slot for slot in found if not slot.is_persistent]:
        about[BUFFERS] = _write(folder, "fp6-buffers", _Shard(buffers))
    sync_folder(folder)
    if (config := _config(model)) is not None:
        replace(folder / "config.json", config)
    replace(folder / INDEX, json.dumps({"metadata": about, "weight_map": where}, indent=2, sort_keys=True) + "\n")
    _remove(folder, old, {*where.values(), about.get(BUFFERS, "")})


def _write(folder: Path, name: str, shard: _Shard) -> str:
    """Write a shard; the name of its file."""
    partial = folder / f"{name}.safetensors.partial"
    path = folder / f"{name}-{write(partial, shard.layout, shard.tensors(), shard.metadata)[:16]}.safetensors"
    os.replace(partial, path)
    return path.name


def _config(model: nn.Module) -> str | None:
    """config.json of a transformers model; None for any other."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    config = copy.deepcopy(config)
    config.architectures, config.dtype = [type(model).__name__], getattr(model, "dtype", None)
    config.quantization_config = quantization_config(model)
    text: str = config.to_json_string()
    return text


def _replaced(folder: Path) -> list[str]:
    """The files of a packed model that is in the folder. ValueError if another model is, which readers would prefer."""
    if not any(os.path.lexists(folder / name) for name in (SINGLE, INDEX)):
        return []
    try:
        return [name for name, _ in shard_metadata(folder)]
    except CheckpointError as error:
        raise ValueError(f"folder: {folder} holds other weights; remove them or save elsewhere ({error})") from error


def remove_leftovers(folder: Path) -> None:
    """After transformers has saved a packed model in its own files: remove what an earlier save left, which readers might
    prefer, of its own kinds of files the older one."""
    both = [path for path in (folder / SINGLE, folder / INDEX) if path.exists()]
    for path in sorted(both, key=lambda path: path.stat().st_mtime_ns)[:-1]:
        path.unlink()
    (folder / version1.INDEX).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if OURS.fullmatch(path.name):
            path.unlink()


def _remove(folder: Path, old: list[str], new: set[str]) -> None:
    """Remove what was replaced, first of all what would be read instead of the new index."""
    for name in (version1.INDEX, SINGLE):
        (folder / name).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if path.name not in new and (path.name in old or OURS.fullmatch(path.name)):
            path.unlink()


@dataclass
class _Shard:
    """The slots of one file."""

    slots: list[Slot] = field(default_factory=list)

    def metadata(self, hashes: Mapping[str, str]) -> dict[str, str]:
        return metadata(*tables(self.slots), hashes)

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape) of every tensor of the file, in order."""
        weights, found = tables(self.slots)[0], dict[str, tuple[torch.dtype, tuple[int, ...]]]()
        for slot in self.slots:
            name, plain = slot.names[0], (slot.tensor.dtype, tuple(slot.tensor.shape))
            found |= weights[name].tensors(name) if name in weights else {name: plain}
        return found

    @property
    def bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.layout.values())

    def tensors(self) -> Iterator[Tensor]:
        """The tensors of `layout`; canonical bit planes exist one weight at a time."""
        for slot in self.slots:
            tensor = slot.tensor
            yield from PackedWeight.of(tensor).stored(tensor) if isinstance(tensor, PackedTensor) else (tensor,)


def _split(found: list[Slot], shard_bytes: int) -> list[_Shard]:
    shards, size = [_Shard()], 0
    for slot in found:
        tensor = slot.tensor
        bytes_ = tensor.packed_bytes if isinstance(tensor, PackedTensor) else tensor.nbytes
        if shards[-1].slots and size + bytes_ > shard_bytes:
            shards, size = [*shards, _Shard()], 0
        shards[-1].slots.append(slot)
        size += bytes_
    return shards


def _check_can_be_saved(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"fp6: {name or 'the model'} ({type(module).__name__}) has extra state, which cannot be saved"
            )
    for slot in slots(model):
        if slot.tensor.is_meta:
            raise ValueError(f"fp6: {slot.names[0]} is on the meta device: it has no values to save")
        if type(slot.tensor) not in (Tensor, nn.Parameter, PackedTensor):
            kind = type(slot.tensor).__name__
            raise ValueError(
                f"fp6: {slot.names[0]} is a {kind}; make it an ordinary tensor first (DTensor: .full_tensor())"
            )
