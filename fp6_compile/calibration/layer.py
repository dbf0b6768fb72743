"""One linear: what an algorithm made of its weight, put into the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp6_compile.algorithms import Algorithm, Quantized
from fp6_compile.calibration.collect import Collector
from fp6_compile.formats import FORMATS
from fp6_compile.lowrank import FACTORS, grow
from fp6_compile.places import Place
from fp6_compile.quantize import Grid
from fp6_compile.report import LinearReport
from fp6_compile.tensor import PackedTensor


def quantize_linear(
    place: Place,
    refusal: tuple[str, bool] | None,
    algorithm: Algorithm,
    grid: Grid,
    group_size: int | None,
    collector: Collector | None,
) -> tuple[LinearReport, dict[str, Tensor]]:
    """Quantize the weight, if it is to be: its line of the report, and the new parameters by name."""
    tensor = place.tensor
    about = place.title, tuple(tensor.shape), tensor.dtype, tensor.nbytes
    if isinstance(tensor, PackedTensor):
        return LinearReport(*about, tensor.packed_bytes, note="packed already"), {}
    if refusal:
        return LinearReport(*about, tensor.nbytes, refusal[0]), {}
    try:
        stats = None if collector is None else collector[place]
        found = algorithm(tensor.detach(), grid, group_size, stats)
    except ValueError as error:
        return LinearReport(*about, tensor.nbytes, str(error)), {}
    place.put(_weight(found, tensor.dtype))
    line = LinearReport(*about, found.bytes, note=_note(place, grid, found, collector))
    return line, {place.names[0]: place.tensor, **_add_extras(place, found)}


def restore(model: nn.Module, part: list[Place], tensors: dict[str, Tensor]) -> None:
    """Put parameters that `quantize_linear` returned, once, into the model."""
    known = {place.names[0]: place for place in part}
    for name, tensor in tensors.items():
        prefix, _, attribute = name.rpartition(".")
        if name in known:
            known[name].put(tensor)
        else:
            grow(model.get_submodule(prefix), attribute, tensor)


def _weight(found: Quantized, dtype: torch.dtype) -> Tensor:
    """What goes into the layer: packed, or dequantized if the backend does not know the grid."""
    name = found.grid.name
    if FORMATS.get(name) != found.grid or found.offset is not None:
        return found.dequantize(dtype)
    return PackedTensor.from_codes(found.codes, found.scale, name, found.group_size, dtype)


def _add_extras(place: Place, found: Quantized) -> dict[str, Tensor]:
    """Give every linear that has the weight its factors and its bias."""
    added: dict[str, Tensor] = {}
    for name, (module, _) in zip(place.names, place.owners, strict=True):
        extras = dict(zip(FACTORS, found.low_rank or (), strict=False))
        if found.shift is not None:
            bias = getattr(module, "bias", None)
            extras["bias"] = (found.shift if bias is None else bias.float() + found.shift).to(place.tensor.dtype)
        for attribute, value in extras.items():
            grow(module, attribute, value)
            added[name.removesuffix("weight") + attribute] = getattr(module, attribute)
    return added


def _note(place: Place, grid: Grid, found: Quantized, collector: Collector | None) -> str | None:
    notes = [f"in {found.grid.name}"] if found.grid != grid else []
    if collector is not None:
        lost = collector.left_out(place)
        if collector[place] is None:
            why = "all its inputs are NaN or infinite" if lost else "never called"
            notes.append(f"{why}: quantized without data")
        elif lost:
            notes.append(f"tokens with NaN or infinite values, left out: {lost}")
    return ", ".join(notes) or None
