"""`quantize_`: every nn.Linear of a model, in place, one weight at a time, freeing as it goes.

The peak is the packed model and one weight. With `source`, a folder of safetensors files, the same holds for a model whose
16-bit weights fit nowhere: make it with its parameters on the meta device, and they are read, packed and dropped one by one.

    with fp6_compile.init_empty_weights():
        model = MyModel()
    fp6_compile.quantize_(model, source="folder", device="cuda")
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile.config import (
    QuantConfig,
    SkipReason,
    names_in,
    skipped_by_kind,
    skipped_by_name,
    warn_of_unmatched,
)
from fp6_compile.kernels.triton.config import supports
from fp6_compile.packed.budget import MIXED, choose_formats
from fp6_compile.packed.low_rank import has_plain_forward
from fp6_compile.packed.slots import Slot, slots, undone_on_error, usable_device
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import LinearReport, Report, log_report, progress
from fp6_compile.storage.safetensors import Entry
from fp6_compile.storage.scaled import Scaled, stored


def quantize_(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    strict: bool = False,
    device: torch.device | str | None = None,
    source: str | os.PathLike[str] | None = None,
    target_bits: float | None = None,
    sensitivity: Mapping[str, float] | None = None,
    **fields: Any,
) -> Report:
    """Replace the weight of every nn.Linear of `model` by a PackedTensor, which does not require grad.

    Args:
        model: any module.
        config: which linears are quantized, and how. Or its fields as keyword arguments: `format="e2m3", group_size=64`.
        strict: raise if a linear cannot be quantized, instead of leaving it as it was.
        device: where the model goes, and where it is quantized; None leaves it where it is (with `source`: a CPU).
        source: a folder of safetensors files, with the names of `model.state_dict()`, that has parameters and buffers; 8-bit
            weights with scales are dequantized (scaled.py says which).
        target_bits: with format="auto", formats of 4 to 8 bits are mixed over the linears so that the model's error is least
            at this many bits a weight, scales counted. Every weight is then read twice.
        sensitivity: for that, of every linear by name, as `fp6_compile.sensitivities` measures it; without it, what it is
            likely to be (budget.py).

    Returns:
        Which linears were quantized, which were skipped and why; it is logged, too.

    Raises:
        ValueError: a bad option, no such device; with `strict`, a linear that cannot be quantized; `source` lacks a tensor
            or has one of another shape, or of a dtype that its parameter cannot have, or is quantized in a way that is not
            read; tensors on the meta device that `source` does not have; `target_bits` without format="auto", or fewer than
            the smallest formats take. The model is then as it was. If a file of `source` changes while it is read,
            parameters that were on the meta device are there again.
        TypeError: an unknown keyword argument.
        FileNotFoundError, ImportError: no safetensors files in `source`; no safetensors library.
    """
    config = QuantConfig.of(config, fields)
    if not isinstance(strict, bool):
        raise ValueError(f"fp6: option 'strict' got {strict!r}, needs True or False")
    if target_bits is not None and config.format != "auto":
        raise ValueError(f"target_bits: got {target_bits} with format={config.format!r}, needs format='auto'")
    model, device = getattr(model, "_orig_mod", model), target_device(device, source)
    warn_of_unmatched(config.skip, names_in(model), type(model).__name__)
    found = slots(model)
    reasons = {id(slot): skip_reason(slot, config, device) for slot in found if is_weight(slot, config)}
    values = Values(found, source, device)
    if strict:
        check_strictly([slot for slot in found if id(slot) in reasons], reasons, values)
    mixed = {} if target_bits is None else _mix(found, reasons, values, config, target_bits, sensitivity or {})
    lines = []
    with undone_on_error(model):
        for slot in progress(found, "fp6: packing"):
            if id(slot) in reasons:
                chosen = replace(config, format=mixed.get(id(slot), config.format))
                lines.append(_pack(slot, values.of(slot), reasons[id(slot)], chosen))
            else:
                keep(slot, values.of(slot))
    report = Report(tuple(lines), config.format)
    log_report(report)
    return report


def target_device(device: torch.device | str | None, source: str | os.PathLike[str] | None) -> torch.device | None:
    """Where a model is quantized: on the given device; with `source` on a CPU; None for wherever its tensors are."""
    return usable_device(device) or (torch.device("cpu") if source is not None else None)


class Values:
    """Where the value of each slot comes from: the model itself, or a folder."""

    def __init__(self, found: list[Slot], source: str | os.PathLike[str] | None, device: torch.device | None) -> None:
        entries = {} if source is None else stored(source, (name for slot in found for name in slot.names))
        # Buffers that state_dict leaves out come from a file only if the model has no values for them.
        wanted = [slot for slot in found if slot.is_persistent or slot.tensor.is_meta]
        self.entries = {id(slot): entries[name] for slot in wanted for name in slot.names if name in entries}
        self.device = device
        missing = [
            p.names[0]
            for p in found
            if id(p) not in self.entries and (p.tensor.is_meta or (source is not None and p.is_persistent))
        ]
        if missing:
            where = "on the meta device: give source=, or load the model" if source is None else "not in source"
            hint = " (fp6_compile.init_empty_weights() keeps buffers off it)" if source is None else ""
            raise ValueError(f"fp6: {len(missing)} tensors of the model are {where}{hint}: {', '.join(missing[:5])}")
        for slot in wanted:
            if (entry := self.entries.get(id(slot))) is not None:
                _check_fits(entry, slot.tensor)

    def of(self, slot: Slot) -> Tensor:
        """The value, on the device; the slot's own tensor if that is where it is."""
        entry = self.entries.get(id(slot))
        if entry is None:
            return slot.tensor.detach().to(self.device or slot.tensor.device)
        return entry.read(self.device or "cpu")


def _check_fits(entry: Entry | Scaled, tensor: Tensor) -> None:
    if entry.shape != tuple(tensor.shape):
        shape = list(tensor.shape)
        raise ValueError(f"fp6: {entry.name} is {list(entry.shape)} in source and {shape} in the model")
    if not entry.fits(tensor.dtype):
        scales = ", without scales," if tensor.is_floating_point() and entry.dtype.startswith(("F8", "I", "U")) else ""
        raise ValueError(f"fp6: {entry.name} is {entry.dtype}{scales} in source and {tensor.dtype} in the model")


def is_weight(slot: Slot, config: QuantConfig) -> bool:
    """Whether the report mentions it: weights of linears, and what is large enough to be one."""
    if any(isinstance(module, nn.Linear) and name == "weight" for module, name in slot.owners):
        return True
    embeds = all(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module, _ in slot.owners)
    large = slot.tensor.dim() in (2, 3) and min(slot.tensor.shape[-2:]) >= config.min_features
    return isinstance(slot.tensor, nn.Parameter) and large and not embeds


def skip_reason(slot: Slot, config: QuantConfig, device: torch.device | None) -> SkipReason | None:
    """Why the weight is not quantized on `device` (None: where it is); None if it is."""
    tensor, names = slot.tensor, [name.removesuffix(".weight") for name in slot.names]
    odd = [(n, type(m).__name__) for n, (m, a) in zip(names, slot.owners, strict=True) if not _is_plain_linear(m, a)]
    first = [
        (0 < len(odd) < len(names), f"shared with {'{} ({})'.format(*odd[0]) if odd else ''}"),
        (len(odd) > 0, f"of {odd[0][1] if odd else ''}, which is no nn.Linear"),
        (type(tensor) not in (nn.Parameter, PackedTensor), f"a tensor subclass, {type(tensor).__name__}"),
    ]
    on_gpu = (device or tensor.device).type == "cuda"
    no_kernel = supports(config.group_size) if on_gpu else None
    return skipped_by_name(config, names, slot.modules) or skipped_by_kind(config, tensor, no_kernel, first)


def _is_plain_linear(module: nn.Module, attribute: str) -> bool:
    return attribute == "weight" and has_plain_forward(module)


def check_strictly(weights: list[Slot], reasons: Mapping[int, SkipReason | None], values: Values) -> None:
    """ValueError for the first weight that is skipped, or cannot be quantized, without anyone having asked for it."""
    for slot in weights:
        reason = reasons[id(slot)]
        if reason is None and not isinstance(slot.tensor, PackedTensor) and not values.of(slot).isfinite().all():
            reason = SkipReason("NaN or infinite values", False)
        if reason is not None and not reason.by_request:
            raise ValueError(f"fp6: strict: cannot quantize {slot.title}: {reason.text}")


def _mix(
    found: list[Slot],
    reasons: Mapping[int, SkipReason | None],
    values: Values,
    config: QuantConfig,
    target_bits: float,
    sensitivity: Mapping[str, float],
) -> dict[int, str]:
    """The format of each weight that is to be packed, by the id of its slot."""
    chosen = [s for s in found if reasons.get(id(s), "") is None and not isinstance(s.tensor, PackedTensor)]
    titles = {slot.title for slot in chosen}
    if sensitivity and sensitivity.keys() != titles:
        name = sorted(sensitivity.keys() ^ titles)[0]
        problem = f"lacks {name!r}" if name in titles else f"got {name!r}, which is no linear that is packed"
        raise ValueError(f"sensitivity: {problem}")
    weights = ((values.of(slot), sensitivity.get(slot.title)) for slot in progress(chosen, "fp6: choosing formats"))
    formats = choose_formats(weights, MIXED, target_bits, config.group_size, config.scale_method)
    return {id(slot): fmt.name for slot, fmt in zip(chosen, formats, strict=True)}


def _pack(slot: Slot, value: Tensor, skip: SkipReason | None, config: QuantConfig) -> LinearReport:
    """Put the weight, packed if it can be, into its slot; its line of the report."""
    dtype, shape = slot.tensor.dtype, tuple(slot.tensor.shape)
    reason = skip.text if skip else None
    before, note = torch.Size(shape).numel() * dtype.itemsize, None
    if isinstance(value, PackedTensor):
        note = "packed already"
        keep(slot, value)
    elif reason is None:
        try:
            how = config.format, config.group_size, config.scale_method
            slot.put(PackedTensor.quantize(value, *how, dtype))
        except ValueError as error:
            reason = str(error)
    if reason is not None:
        keep(slot, value)
    packed = slot.tensor
    after = packed.packed_bytes if isinstance(packed, PackedTensor) else before
    format = packed.spec.format if isinstance(packed, PackedTensor) else None
    return LinearReport(slot.title, shape, dtype, before, after, reason, note, format)


def keep(slot: Slot, value: Tensor) -> None:
    """Put a value that is not packed into its slot, in the slot's dtype, unless it is there already."""
    old = slot.tensor
    if old.is_meta or value.device != old.device or value.data_ptr() != old.data_ptr():
        slot.put(value.to(old.dtype))
