"""`quantize_`: every nn.Linear of a model, in place, one weight at a time, freeing as it goes.

The peak is the packed model and one weight. With `source`, a folder of safetensors files, the same holds for a model whose
16-bit weights fit nowhere: make it with its parameters on the meta device, and they are read, packed and dropped one by one.

    with fp6_compile.empty_parameters():
        model = MyModel()
    fp6_compile.quantize_(model, source="folder", device="cuda")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fp6_compile.config import Options, names_in, warn_of_unmatched
from fp6_compile.formats import DEFAULT
from fp6_compile.kernels.triton.config import supports
from fp6_compile.packed.budget import MIXED, choose_formats
from fp6_compile.packed.low_rank import has_plain_forward
from fp6_compile.packed.slots import Slot, slots, undone_on_error, usable
from fp6_compile.packed.tensor import DTYPES, PackedTensor
from fp6_compile.report import LinearReport, Report, log_report, progress
from fp6_compile.storage.safetensors import Entry
from fp6_compile.storage.scaled import Scaled, stored


def quantize_(
    model: nn.Module,
    *,
    format: str = DEFAULT,
    group_size: int | None = None,
    scale: str = "absmax",
    skip: Sequence[str] = (),
    min_features: int = 128,
    float32: bool = False,
    strict: bool = False,
    device: torch.device | str | None = None,
    source: str | os.PathLike[str] | None = None,
    target_bits: float | None = None,
    sensitivity: Mapping[str, float] | None = None,
) -> Report:
    """Replace the weight of every nn.Linear of `model` by a PackedTensor, which does not require grad.

    Args:
        model: any module.
        format, group_size, scale, skip, min_features, float32, strict: as in config.Options; names are module names.
        device: where the model goes, and where it is quantized; None leaves it where it is (with `source`: a CPU).
        source: a folder of safetensors files, with the names of `model.state_dict()`, that has parameters and buffers; 8-bit
            weights with scales are dequantized (scaled.py says which).
        target_bits: with format="auto", formats of 4 to 8 bits are mixed over the linears so that the model's error is least
            at this many bits a weight, scales counted. Every weight is then read twice.
        sensitivity: for that, of every linear by name, as `fp6_compile.sensitivities` measures it; without it, what it is
            likely to be (algorithms/budget.py).

    Returns:
        What was packed, what was left alone and why; it is logged, too.

    Raises:
        ValueError: a bad option, no such device; with `strict`, a linear that cannot be packed; `source` lacks a tensor or
            has one of another shape, or of a dtype that its parameter cannot have, or is quantized in a way that is not
            read; tensors on the meta device that `source` does not have; `target_bits` without format="auto", or fewer than
            the smallest formats take. The model is then as it was. A file of `source` that changes while it is read:
            parameters that were on the meta device are there again.
        FileNotFoundError, ImportError: no safetensors files in `source`; no safetensors library.
    """
    given = {"format": format, "group_size": group_size, "scale": scale, "skip": skip, "min_features": min_features}
    options = Options.parse(None, {**given, "float32": float32, "strict": strict})
    if target_bits is not None and format != "auto":
        raise ValueError(f"target_bits: got {target_bits} with format={format!r}, needs format='auto'")
    model = getattr(model, "_orig_mod", model)
    target = usable(device) or (torch.device("cpu") if source is not None else None)
    warn_of_unmatched(options, names_in(model), type(model).__name__)
    found = slots(model)
    refusals = {id(slot): refusal(slot, options, target) for slot in found if is_weight(slot, options)}
    values = Values(found, source, target)
    if strict:
        check_strictly([slot for slot in found if id(slot) in refusals], refusals, values)
    mixed = {} if target_bits is None else _mix(found, refusals, values, options, target_bits, sensitivity or {})
    lines = []
    with undone_on_error(model):
        for slot in progress(found, "fp6: packing"):
            if id(slot) in refusals:
                chosen = replace(options, format=mixed.get(id(slot), options.format))
                lines.append(_pack(slot, values.of(slot), refusals[id(slot)], chosen))
            else:
                keep(slot, values.of(slot))
    report = Report(tuple(lines), format)
    log_report(report)
    return report


class Values:
    """Where the values of each place come from: the model itself, or a folder."""

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
            hint = " (fp6_compile.empty_parameters() keeps buffers off it)" if source is None else ""
            raise ValueError(f"fp6: {len(missing)} tensors of the model are {where}{hint}: {', '.join(missing[:5])}")
        for slot in wanted:
            if (entry := self.entries.get(id(slot))) is not None:
                _check_fits(entry, slot.tensor)

    def of(self, slot: Slot) -> Tensor:
        """The value, on the device; the place's own tensor if that is where it is."""
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


def is_weight(slot: Slot, options: Options) -> bool:
    """Whether the report mentions it: weights of linears, and what is large enough to be one."""
    if any(isinstance(module, nn.Linear) and name == "weight" for module, name in slot.owners):
        return True
    embeds = all(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module, _ in slot.owners)
    large = slot.tensor.dim() in (2, 3) and min(slot.tensor.shape[-2:]) >= options.min_features
    return isinstance(slot.tensor, nn.Parameter) and large and not embeds


def refusal(slot: Slot, options: Options, device: torch.device | None) -> tuple[str, bool] | None:
    """Why it is left alone, and whether the user asked for just that, so that `strict` is content; or None."""
    tensor, names = slot.tensor, [name.removesuffix(".weight") for name in slot.names]
    if glob := options.skips(names):
        return f"skipped by {glob!r}", True
    odd = [(n, type(m).__name__) for n, (m, a) in zip(names, slot.owners, strict=True) if not _is_plain_linear(m, a)]
    asked = (torch.float16, torch.bfloat16, *([torch.float32] if options.float32 else []))
    on_gpu = (device or tensor.device).type == "cuda"
    no_kernel = supports(options.group_size) if on_gpu else None
    # (whether it holds, what to say); the first that holds is the reason.
    checks = [
        (0 < len(odd) < len(names), f"shared with {'{} ({})'.format(*odd[0]) if odd else ''}"),
        (len(odd) > 0, f"of {odd[0][1] if odd else ''}, which is no nn.Linear"),
        (type(tensor) not in (nn.Parameter, PackedTensor), f"a tensor subclass, {type(tensor).__name__}"),
        (tensor.dtype not in DTYPES, f"{tensor.dtype} weight"),
        (tensor.dtype not in asked, "float32 weight, and float32=True was not given"),
        (no_kernel is not None, str(no_kernel)),
    ]
    if reason := next((reason for holds, reason in checks if holds), None):
        return reason, False
    if min(tensor.shape) < options.min_features:
        return f"fewer than {options.min_features} inputs or outputs (min_features)", True
    return None


def _is_plain_linear(module: nn.Module, attribute: str) -> bool:
    return attribute == "weight" and has_plain_forward(module)


def check_strictly(weights: list[Slot], refusals: Mapping[int, tuple[str, bool] | None], values: Values) -> None:
    for slot in weights:
        reason, excused = refusals[id(slot)] or (None, True)
        if reason is None and not isinstance(slot.tensor, PackedTensor) and not values.of(slot).isfinite().all():
            reason, excused = "NaN or infinite values", False
        if not excused:
            raise ValueError(f"fp6: strict: cannot pack {slot.title}: {reason}")


def _mix(
    found: list[Slot],
    refusals: Mapping[int, tuple[str, bool] | None],
    values: Values,
    options: Options,
    target_bits: float,
    sensitivity: Mapping[str, float],
) -> dict[int, str]:
    """The format of each weight that is to be packed, by the id of its place."""
    taken = [p for p in found if refusals.get(id(p), "") is None and not isinstance(p.tensor, PackedTensor)]
    titles = {slot.title for slot in taken}
    if sensitivity and sensitivity.keys() != titles:
        name = sorted(sensitivity.keys() ^ titles)[0]
        problem = f"lacks {name!r}" if name in titles else f"got {name!r}, which is no linear that is packed"
        raise ValueError(f"sensitivity: {problem}")
    weights = ((values.of(slot), sensitivity.get(slot.title)) for slot in progress(taken, "fp6: choosing formats"))
    chosen = choose_formats(weights, MIXED, target_bits, options.group_size, options.scale)
    return {id(slot): fmt.name for slot, fmt in zip(taken, chosen, strict=True)}


def _pack(slot: Slot, value: Tensor, refusal: tuple[str, bool] | None, options: Options) -> LinearReport:
    """Put the weight, packed if it can be, into its place; its line of the report."""
    dtype, shape = slot.tensor.dtype, tuple(slot.tensor.shape)
    reason = refusal[0] if refusal else None
    before, note = torch.Size(shape).numel() * dtype.itemsize, None
    if isinstance(value, PackedTensor):
        note = "packed already"
        keep(slot, value)
    elif reason is None:
        try:
            slot.put(PackedTensor.quantize(value, options.format, options.group_size, options.scale, dtype))
        except ValueError as error:
            reason = str(error)
    if reason is not None:
        keep(slot, value)
    packed = slot.tensor
    after = packed.packed_bytes if isinstance(packed, PackedTensor) else before
    format = packed.spec.format if isinstance(packed, PackedTensor) else None
    return LinearReport(slot.title, shape, dtype, before, after, reason, note, format)


def keep(slot: Slot, value: Tensor) -> None:
    """Put a value that is not packed into its place, in the place's dtype, unless it is there already."""
    old = slot.tensor
    if old.is_meta or value.device != old.device or value.data_ptr() != old.data_ptr():
        slot.put(value.to(old.dtype))
