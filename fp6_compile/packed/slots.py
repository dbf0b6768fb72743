"""A model's parameters and buffers: each once, with all its names, so that replacing it replaces it everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fp6_compile.packed.tensor import PackedTensor


@dataclass(eq=False)
class Slot:
    """A parameter or buffer and everywhere it is found: tied ones have several names."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Put `value` where the tensor was, everywhere. A parameter stays one; packed, it does not require grad."""
        if isinstance(self.tensor, nn.Parameter):
            keeps_grad = self.tensor.requires_grad and not isinstance(value, PackedTensor)
            value = nn.Parameter(value.detach(), requires_grad=keeps_grad)
        for module, attribute in self.owners:
            setattr(module, attribute, value)
        self.tensor = value

    def join(self, other: Slot) -> None:
        """Make `other` a part of this slot: what is put here is put there, too."""
        self.names, self.owners = self.names + other.names, self.owners + other.owners

    @property
    def title(self) -> str:
        """Its name in reports: of a linear that has it, if one does."""
        linear = (n for n, (m, _) in zip(self.names, self.owners, strict=True) if isinstance(m, nn.Linear))
        return next(linear, self.names[0]).removesuffix(".weight")

    @property
    def modules(self) -> list[tuple[nn.Module, str]]:
        """The modules that have it, with their fully qualified names."""
        names = (name.rpartition(".")[0] for name in self.names)
        return [(module, name) for name, (module, _) in zip(names, self.owners, strict=True)]

    def device(self, chosen: torch.device | None) -> torch.device:
        """Where its value goes: to the `chosen` device, or to where it is; a CPU for the meta device."""
        device = chosen or self.tensor.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def is_persistent(self) -> bool:
        """Whether it is in the model's state_dict."""
        return any(attribute not in module._non_persistent_buffers_set for module, attribute in self.owners)


def slots(model: nn.Module) -> list[Slot]:
    """The parameters and buffers of a model, in order, tied ones once."""
    found: dict[int, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                slot = found.setdefault(id(tensor), Slot(tensor))
                slot.names.append(f"{prefix}.{attribute}" if prefix else attribute)
                slot.owners.append((module, attribute))
    return list(found.values())


def usable_device(device: torch.device | str | None) -> torch.device | None:
    """The device that an argument `device` names. ValueError if this machine has none such, or it holds no values."""
    if device is None:
        return None
    try:
        found = torch.empty(0, device=device).device
    # torch's own: no such device, no such name, not built for it
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device: got {device!r}: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise ValueError("device: got 'meta', needs one that holds values")
    return found


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, parameters that were on the meta device or not there at all are so again, and buffers
    as they were. The values of other parameters are not kept: they would be in memory twice."""
    before: list[tuple[dict[str, Any], dict[str, Tensor | None]]] = [
        (
            registry,
            {name: tensor for name, tensor in registry.items() if registry is module._buffers or _is_empty(tensor)},
        )
        for module in model.modules()
        for registry in (module._parameters, module._buffers)
    ]
    known = [set(registry) for registry, _ in before]
    try:
        yield
    except BaseException:
        for (registry, old), names in zip(before, known, strict=True):
            for name in registry.keys() - names:
                del registry[name]
            registry.update(old)
        raise


def _is_empty(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_meta


@contextlib.contextmanager
def init_empty_weights() -> Iterator[None]:
    """Modules made in this context have their parameters on the meta device, and their buffers where they belong.

    What `torch.device("meta")` does not give: buffers that are computed when the model is made (rotary frequencies), and
    that no checkpoint has. For this context torch.nn.Module registers every parameter as an empty one, in all threads.
    """

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
