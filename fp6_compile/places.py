"""Where a model's tensors are: each once, with all its names, so that what is put in its place is put everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fp6_compile.tensor import PackedTensor


@dataclass(eq=False)
class Place:
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

    def join(self, other: Place) -> None:
        """Make `other` a part of this place: what is put here is put there, too."""
        self.names, self.owners = self.names + other.names, self.owners + other.owners

    @property
    def title(self) -> str:
        """Its name in reports: of a linear that has it, if one does."""
        linear = (n for n, (m, _) in zip(self.names, self.owners, strict=True) if isinstance(m, nn.Linear))
        return next(linear, self.names[0]).removesuffix(".weight")

    @property
    def is_persistent(self) -> bool:
        """Whether it is in the model's state_dict."""
        return any(attribute not in module._non_persistent_buffers_set for module, attribute in self.owners)


def places(model: nn.Module) -> list[Place]:
    """The parameters and buffers of a model, in order, tied ones once."""
    found: dict[int, Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                place = found.setdefault(id(tensor), Place(tensor))
                place.names.append(f"{prefix}.{attribute}" if prefix else attribute)
                place.owners.append((module, attribute))
    return list(found.values())


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
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
