"""A model and its inputs without their values, on another device: what is traced in place of the user's own.

The copy shares code with the model and nothing else: its tensors are FakeTensors, so it takes no memory, and nothing that
happens to it reaches the model. Each fake knows the tensor that it stands for.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import layout_for, pack
from fp6_compile.packed.tensor import PackedTensor

T = TypeVar("T")


class Fakes(TorchFunctionMode):
    """Fakes of tensors on `device`, one each; as a mode, it makes copy.deepcopy copy tensors into their fakes.

    Tensors on the device `home`, where the model is, or on the meta device go to `device`; others stay where they are, as a
    scalar that is kept on the CPU.
    """

    def __init__(self, device: torch.device, home: torch.device) -> None:
        super().__init__()
        self.device = device
        self.home = home
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[int, Tensor] = {}
        self._reals: dict[int, Tensor] = {}

    def copy(self, value: T) -> T:
        """A copy of any object, with fakes where it had tensors.

        Raises ValueError for what cannot be copied, such as a model that holds a lock or a generator.
        """
        memo: dict[int, Tensor] = {}
        for module in _modules(value):
            memo |= {id(tensor): self.of(tensor) for tensor in (*module.parameters(), *module.buffers())}
        try:
            with self.mode, self, mock.patch.dict(copyreg.dispatch_table, {torch.device: self._reduced}):
                return copy.deepcopy(value, memo)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"fp6: explain looks at a copy without values, and copying failed: {error}") from error

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor."""
        if id(tensor) not in self._fakes:
            fake = self._make(tensor)
            # Marks such as torch._dynamo.mark_dynamic and mark_static_address.
            vars(fake).update({name: mark for name, mark in vars(tensor).items() if name.startswith("_dynamo_")})
            self._fakes[id(tensor)], self._reals[id(fake)] = fake, tensor
        return self._fakes[id(tensor)]

    def real(self, fake: Any) -> Tensor | None:
        """The tensor that `fake` stands for; None for one that was made on the way."""
        return self._reals.get(id(fake))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Copy a tensor into its fake."""
        return self.of(args[0]) if func is Tensor.__deepcopy__ else func(*args, **kwargs or {})

    def _moved(self, device: torch.device) -> torch.device:
        return self.device if device.type in (self.home.type, "meta") else device

    def _reduced(self, device: torch.device) -> tuple[type, tuple[str]]:
        """For copy: a device that an object keeps, as a static cache does, moves with its tensors."""
        return torch.device, (str(self._moved(device)),)

    def _make(self, tensor: Tensor) -> Tensor:
        device = self._moved(tensor.device)
        with self.mode, torch._C.DisableTorchFunction():
            if isinstance(tensor, PackedTensor):
                return nn.Parameter(_packed(tensor, device), requires_grad=False)
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _packed(tensor: PackedTensor, device: torch.device) -> PackedTensor:
    """In the layout of `device`, as `tensor.to(device)` would be."""
    fmt = get_format(tensor.spec.format)
    spec = tensor.spec._replace(layout=layout_for(device, tensor.spec.dtype, fmt))
    codes = torch.empty(tensor.scale.shape[1], spec.k, dtype=torch.uint8, device=device)
    scale = torch.empty(tensor.scale.shape, device=device)
    return PackedTensor(pack(codes, fmt, spec.layout), scale, spec)


def _modules(value: object) -> list[nn.Module]:
    return [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, nn.Module)]
