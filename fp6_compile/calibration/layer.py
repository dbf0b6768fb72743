"""One linear: quantize its weight and put the result into the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp6_compile.calibration.algorithms import Algorithm, Quantized
from fp6_compile.calibration.collect import Collector
from fp6_compile.config import SkipReason
from fp6_compile.packed.low_rank import FACTORS, grow
from fp6_compile.packed.slots import Slot
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.quantize import Grid
from fp6_compile.report import LinearReport


def quantize_linear(
    slot: Slot,
    skip: SkipReason | None,
    algorithm: Algorithm,
    grid: Grid,
    group_size: int | None,
    collector: Collector | None,
) -> tuple[LinearReport, dict[str, Tensor]]:
    """Quantize a weight, unless `skipped` says why not. Returns its line of the report and the new parameters by name."""
    tensor = slot.tensor
    about = slot.title, tuple(tensor.shape), tensor.dtype, tensor.nbytes
    if isinstance(tensor, PackedTensor):
        return LinearReport(*about, tensor.packed_bytes, note="packed already", format=tensor.spec.format), {}
    if skip is not None:
        return LinearReport(*about, tensor.nbytes, skip.text), {}
    try:
        stats = None if collector is None else collector[slot]
        found = algorithm(tensor.detach(), grid, group_size, stats)
    except ValueError as error:
        return LinearReport(*about, tensor.nbytes, str(error)), {}
    slot.put(_weight(found, tensor.dtype))
    line = LinearReport(*about, found.bytes, note=_note(slot, collector), format=found.grid.name)
    return line, {slot.names[0]: slot.tensor, **_add_extras(slot, found)}


def restore(model: nn.Module, part: list[Slot], tensors: dict[str, Tensor]) -> None:
    """Put parameters that an earlier `quantize_linear` returned into the model."""
    known = {slot.names[0]: slot for slot in part}
    for name, tensor in tensors.items():
        prefix, _, attribute = name.rpartition(".")
        if name in known:
            known[name].put(tensor)
        else:
            grow(model.get_submodule(prefix), attribute, tensor)


def _weight(found: Quantized, dtype: torch.dtype) -> Tensor:
    """The layer's new weight: packed, or dequantized if no PackedTensor can hold it."""
    if not found.packable:
        return found.dequantize(dtype)
    return PackedTensor.from_codes(found.codes, found.scale, found.grid.name, found.group_size, dtype)


def _add_extras(slot: Slot, found: Quantized) -> dict[str, Tensor]:
    """Give the low-rank factors and the bias to every linear that has the weight."""
    added: dict[str, Tensor] = {}
    for name, (module, _) in zip(slot.names, slot.owners, strict=True):
        extras = dict(zip(FACTORS, found.low_rank or (), strict=False))
        if found.shift is not None:
            bias = getattr(module, "bias", None)
            extras["bias"] = (found.shift if bias is None else bias.float() + found.shift).to(slot.tensor.dtype)
        for attribute, value in extras.items():
            grow(module, attribute, value)
            added[name.removesuffix("weight") + attribute] = getattr(module, attribute)
    return added


def _note(slot: Slot, collector: Collector | None) -> str | None:
    if collector is None:
        return None
    lost = collector.left_out(slot)
    if collector[slot] is None:
        why = "all its inputs are NaN or infinite" if lost else "never called"
        return f"{why}: quantized without data"
    return f"tokens with NaN or infinite values, left out: {lost}" if lost else None
