"""Which weights of an empty transformers model will be packed, and why others will not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp6_compile.config import SkipReason
from fp6_compile.integrations.transformers.config import Fp6Config
from fp6_compile.integrations.transformers.names import (
    HfQuantizer,
    kept_in_float32,
    should_convert_module,
    tied_names,
)
from fp6_compile.packed.quantize_model import is_weight, skip_reason
from fp6_compile.packed.slots import Slot, slots
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import LinearReport, Report, log


class Plan:
    """Of a model on the meta device, whose tied weights are not tied yet.

    packed: names of the parameters that are packed. A tied one has several names.
    """

    def __init__(self, model: Any, config: Fp6Config, on_gpu: bool) -> None:
        self.config = config
        self._excluded = HfQuantizer.get_modules_to_not_convert(
            model, config.modules_to_not_convert, kept_in_float32(model)
        )
        _check_names(model, config)
        device = torch.device("cuda") if on_gpu else None
        weights = [slot for slot in _tied_slots(model) if is_weight(slot, config.quant_config())]
        self.reasons = {slot.title: self._reason(slot, device) for slot in weights}
        self.packed = {name for slot in weights if self.reasons[slot.title] is None for name in slot.names}

    def _reason(self, slot: Slot, device: torch.device | None) -> SkipReason | None:
        module = slot.title
        for name in slot.names:
            if not should_convert_module(name.removesuffix(".weight"), self._excluded):
                return SkipReason("modules_to_not_convert", True)
        return skip_reason(slot, self.config.quant_config(module), device)

    def report(self, model: nn.Module, refused: dict[str, str]) -> Report:
        """What became of the weights of the loaded model; `refused` are reasons of those that could not be packed."""
        lines = [self._line(slot, refused) for slot in slots(model) if slot.title in self.reasons]
        return Report(tuple(lines), self.config.format)

    def _line(self, slot: Slot, refused: dict[str, str]) -> LinearReport:
        tensor, skip = slot.tensor, self.reasons[slot.title]
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if isinstance(tensor, PackedTensor):
            return LinearReport(slot.title, shape, dtype, tensor.nbytes, tensor.packed_bytes, format=tensor.spec.format)
        reason = (
            skip.text if skip else next((refused[name] for name in slot.names if name in refused), "not in the files")
        )
        return LinearReport(slot.title, shape, dtype, tensor.nbytes, tensor.nbytes, reason)


def _tied_slots(model: nn.Module) -> list[Slot]:
    found = slots(model)
    by_name = {name: slot for slot in found for name in slot.names}
    for alias, name in tied_names(model).items():
        one, other = by_name.get(alias), by_name.get(name)
        if one is not None and other is not None and one is not other:
            other.join(one)
            found.remove(one)
            by_name |= dict.fromkeys(other.names, other)
    return found


def _check_names(model: nn.Module, config: Fp6Config) -> None:
    """A format for what is no module is an error; a module to leave out that is none, a warning, as in `quantize_`."""
    modules = [name for name, _ in model.named_modules() if name]
    if unknown := sorted(config.module_formats.keys() - set(modules)):
        raise ValueError(f"fp6: module_formats names {unknown[0]!r}, which is no module of {type(model).__name__}")
    for pattern in config.modules_to_not_convert or ():
        if all(should_convert_module(name, [pattern]) for name in modules):
            log.warning("fp6: modules_to_not_convert: %r matches no module of %s", pattern, type(model).__name__)
