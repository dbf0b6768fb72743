"""`load`: a packed model from a folder of `save` or of transformers' `save_pretrained`.

It checks everything, every tensor and whether it fits the model, before it touches the model, and then goes through it one
tensor at a time, from files that it has held open since it checked them to the device and into the device's layout.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from fp6_compile.checkpoint.manifest import Manifest
from fp6_compile.checkpoint.packed_weight import CheckpointError, PackedWeight
from fp6_compile.packed import low_rank as lowrank
from fp6_compile.packed.slots import Slot, slots, undone_on_error, usable_device
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import LinearReport, Report, progress
from fp6_compile.storage.files import short
from fp6_compile.storage.safetensors import Entry, safetensors


def load(model: nn.Module, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Report:
    """Give `model` the parameters and buffers of a folder, packed ones in the layout of their device.

    Args:
        model: of the same class and configuration as the saved one, packed or not; best made under `torch.device("meta")`.
        folder: what `save` or a packed transformers model's `save_pretrained` wrote, of this version or of version 1.
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
        slot.put(manifest.weights[name].read(name, manifest.entries, target))


def _line(slot: Slot) -> LinearReport:
    packed = slot.tensor
    assert isinstance(packed, PackedTensor)
    return LinearReport(slot.title, tuple(packed.shape), packed.dtype, packed.nbytes, packed.packed_bytes)


def _check_fits(found: dict[str, Slot], manifest: Manifest) -> None:
    stored: dict[str, Entry | PackedWeight] = {**manifest.plain, **manifest.weights}
    stored |= {alias: stored[name] for alias, name in manifest.tied.items()}
    missing = sorted(name for name, slot in found.items() if not _is_filled(slot, stored.keys()))
    extra = sorted(stored.keys() - found.keys())
    if missing or extra:
        parts = [f"lacks {len(missing)} of its tensors ({', '.join(missing[:3])})"] if missing else []
        parts += [f"has {len(extra)} others ({', '.join(map(short, extra[:3]))})"] if extra else []
        raise CheckpointError(f"fp6: {manifest.folder} is not of this model: it {' and '.join(parts)}")
    for name, about in stored.items():
        tensor = found[name].tensor
        if tuple(tensor.shape) != tuple(about.shape):
            have, want = list(tensor.shape), list(about.shape)
            raise CheckpointError(f"fp6: {name} is {have} in the model and {want} in {manifest.folder}")
        if not about.fits(tensor.dtype):
            raise CheckpointError(f"fp6: {name} is {tensor.dtype} in the model and {about.dtype} in {manifest.folder}")


def _is_filled(slot: Slot, stored: Collection[str]) -> bool:
    """Whether a slot has its values when all that is stored is loaded: under one of its names, or it has them already, as
    buffers have that are made with the model and that transformers does not store."""
    return any(name in stored for name in slot.names) or not (slot.is_persistent or slot.tensor.is_meta)
