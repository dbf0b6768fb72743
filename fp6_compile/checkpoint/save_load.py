"""`save` and `load`: a packed model in a folder. What is in the folder: manifest.py.

`save` writes each shard under a name of its own, and last of all, in one atomic step, the index that names them. Killed at
any moment it leaves the old index with its shards, or the new one with its; files of others, such as a transformers model's
configuration, stay as they are. (Exchanging whole folders would lose those, and needs a system call that not all systems
have.) Shards that no index names are removed by the next save: one writer at a time.

`load` checks everything, every byte and whether it fits the model, before it touches the model, and then goes through it one
tensor at a time, from files that it has held open since it checked them to the device and into the device's layout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile.checkpoint.manifest import (
    INDEX,
    CheckpointError,
    Manifest,
    PackedWeight,
    index_text,
    metadata,
    shards_of,
)
from fp6_compile.layouts.packing import PLANES
from fp6_compile.packed import low_rank as lowrank
from fp6_compile.packed.slots import Slot, slots, undone_on_error, usable_device
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import LinearReport, Report, progress
from fp6_compile.storage.files import short
from fp6_compile.storage.safetensors import Entry, read, replace, safetensors, sync_folder, write

_SHARD_BYTES = 4 << 30


def save(model: nn.Module, folder: str | os.PathLike[str], *, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write all parameters and buffers of `model` to `folder`, packed ones in canonical bit planes. Atomic.

    Buffers that are not persistent are written too: a model that is made on the meta device has no other source of them.

    Raises:
        ValueError: tensors on the meta device, of a subclass other than PackedTensor, or of a dtype that safetensors has
            not; a module with extra state. The folder is then as it was.
        ImportError: no safetensors library.
    """
    safetensors()
    model = getattr(model, "_orig_mod", model)
    _check_can_be_saved(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(slots(model), shard_bytes)
    written: dict[str, dict[str, Any]] = {}
    for number, shard in enumerate(progress(shards, "fp6: saving"), 1):
        partial = folder / f"fp6-{number:05}-of-{len(shards):05}.safetensors.partial"
        digest = write(partial, shard.layout, shard.tensors(), metadata(shard.weights, shard.tied))
        path = folder / f"fp6-{number:05}-of-{len(shards):05}-{digest[:16]}.safetensors"
        written[path.name] = {"bytes": partial.stat().st_size, "sha256": digest}
        os.replace(partial, path)
    sync_folder(folder)
    replace(folder / INDEX, index_text(written))
    for path in shards_of(folder):
        if path.name not in written:
            path.unlink()


def load(model: nn.Module, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Report:
    """Give `model` the parameters and buffers that `save` wrote, packed ones in the layout of their device.

    Args:
        model: of the same class and configuration as the saved one, packed or not; best made under `torch.device("meta")`.
        folder: what `save` wrote.
        device: where to; None leaves every tensor on the device that the model has it on (a CPU for the meta device).

    Returns:
        The packed weights.

    Raises:
        CheckpointError (a ValueError): the folder is no checkpoint, is damaged, of an unknown version, or does not fit the
            model. The model is then as it was.
        ValueError: no such device, and the model is as it was; a file that is changed while it is loaded, and parameters
            that were on the meta device are there again.
        ImportError: no safetensors library.
    """
    safetensors()
    model, target = getattr(model, "_orig_mod", model), usable_device(device)
    manifest = Manifest.read(Path(folder))
    found = {name: slot for slot in slots(model) for name in slot.names}
    grown = _growth(model, found, manifest)
    found |= grown
    _check_fits(found, manifest)
    aliases: dict[str, list[Slot]] = {}
    for alias, name in manifest.tied.items():
        aliases.setdefault(name, []).append(found[alias])
    for name, others in aliases.items():
        for other in others:
            if other is not found[name]:
                found[name].join(other)
    lines = []
    with undone_on_error(model):
        for name in progress([*manifest.plain, *manifest.weights], "fp6: loading"):
            _fill(found[name], name, manifest, target)
            if name in manifest.weights:
                lines.append(_line(found[name]))
    for slot in grown.values():
        linear, attribute = slot.owners[0]
        lowrank.grow(linear, attribute, getattr(linear, attribute))
    return Report(tuple(lines), ", ".join(sorted({weight.spec.format for weight in manifest.weights.values()})))


def _growth(model: nn.Module, found: dict[str, Slot], manifest: Manifest) -> dict[str, Slot]:
    """Slots for tensors of the folder that linears of the model can be given: factors, biases (low_rank.py)."""
    entries = manifest.plain | {alias: manifest.plain[n] for alias, n in manifest.tied.items() if n in manifest.plain}
    new = {name: entry for name, entry in entries.items() if name not in found}
    owners = lowrank.growth(model, {name: entry.shape for name, entry in new.items()})
    return {
        name: Slot(lowrank.empty(new[name].shape, linear.get_parameter("weight").dtype), [name], [(linear, attribute)])
        for name, (linear, attribute) in owners.items()
    }


def _fill(slot: Slot, name: str, manifest: Manifest, device: torch.device | None) -> None:
    target = slot.device(device)
    if name in manifest.plain:
        slot.put(manifest.plain[name].read(target))
    else:
        slot.put(_read_packed(manifest, name, target))


def _read_packed(manifest: Manifest, name: str, device: torch.device) -> PackedTensor:
    weight = manifest.weights[name]
    *planes, scale = (t for _, t in read((manifest.entries[f"{name}.{s}"] for s in weight.tensors()), device))
    spec = weight.spec
    return PackedTensor.from_planes(planes, scale, spec.format, spec.group_size, spec.k, spec.dtype)


def _line(slot: Slot) -> LinearReport:
    packed = slot.tensor
    assert isinstance(packed, PackedTensor)
    return LinearReport(slot.title, tuple(packed.shape), packed.dtype, packed.nbytes, packed.packed_bytes)


@dataclass
class _Shard:
    """The slots of one file."""

    slots: list[Slot] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, PackedWeight]:
        packed = {p.names[0]: p.tensor for p in self.slots if isinstance(p.tensor, PackedTensor)}
        return {n: PackedWeight(t.spec._replace(layout=PLANES, k=t.shape[1]), t.shape[0]) for n, t in packed.items()}

    @property
    def tied(self) -> dict[str, str]:
        return {alias: slot.names[0] for slot in self.slots for alias in slot.names[1:]}

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape) of every tensor of the file, in order."""
        weights, found = self.weights, {}
        for slot in self.slots:
            name = slot.names[0]
            parts = {f".{s}": about for s, about in weights[name].tensors().items()} if name in weights else {}
            for suffix, about in (parts or {"": (slot.tensor.dtype, tuple(slot.tensor.shape))}).items():
                found[f"{name}{suffix}"] = about
        return found

    def tensors(self) -> Iterator[Tensor]:
        """The tensors of `layout`; canonical bit planes exist one weight at a time."""
        for slot in self.slots:
            if isinstance(slot.tensor, PackedTensor):
                packed = slot.tensor.repack(PLANES)
                yield from (*packed.planes, packed.scale)
            else:
                yield slot.tensor


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


def _check_fits(found: dict[str, Slot], manifest: Manifest) -> None:
    stored: dict[str, Entry | PackedWeight] = {**manifest.plain, **manifest.weights}
    stored |= {alias: stored[name] for alias, name in manifest.tied.items()}
    missing, extra = sorted(found.keys() - stored.keys()), sorted(stored.keys() - found.keys())
    if missing or extra:
        parts = [f"lacks {len(missing)} of its tensors ({', '.join(missing[:3])})"] if missing else []
        parts += [f"has {len(extra)} others ({', '.join(map(short, extra[:3]))})"] if extra else []
        raise CheckpointError(f"fp6: {manifest.folder} is not of this model: it {' and '.join(parts)}")
    for name, slot in found.items():
        about, tensor = stored[name], slot.tensor
        if tuple(tensor.shape) != tuple(about.shape):
            have, want = list(tensor.shape), list(about.shape)
            raise CheckpointError(f"fp6: {name} is {have} in the model and {want} in {manifest.folder}")
        if not about.fits(tensor.dtype):
            raise CheckpointError(f"fp6: {name} is {tensor.dtype} in the model and {about.dtype} in {manifest.folder}")
