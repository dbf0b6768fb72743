"""The model and its inputs, rebuilt without values on another device.

The tensors are FakeTensors, which take no memory. Each fake knows the key of the tensor that it stands for.
"""

from __future__ import annotations

import io
import marshal
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile._compat.torch import FakeTensorMode
from fp6_compile.explanation.request import TensorInfo, cannot_copy
from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import layout_for, pack
from fp6_compile.packed.tensor import PackedTensor


class Fakes:
    """Fakes of tensors on `target`, one for each tensor.

    Tensors on the type of device `home`, where the model is, or on the meta device go to `target`. Others stay where they
    are, as a scalar that is kept on the CPU.
    """

    def __init__(self, target: torch.device, home: str) -> None:
        self.device = target
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._home = home
        self._fakes: dict[int, Tensor] = {}
        self._keys: dict[int, int] = {}

    def read(self, data: bytes) -> Any:
        """The object that request.Writer wrote. Raises ValueError where that fails, as for a module that is not there."""
        try:
            with self.mode:
                return _Reader(data, self).load()
        except (TypeError, AttributeError, ImportError, RuntimeError, NotImplementedError) as error:
            raise cannot_copy(error) from error

    def of(self, info: TensorInfo) -> Tensor:
        """The fake of a tensor."""
        if info.key not in self._fakes:
            fake = self._make(info, self.moved(torch.device(info.device)))
            vars(fake).update(info.marks)
            self._fakes[info.key], self._keys[id(fake)] = fake, info.key
        return self._fakes[info.key]

    def key(self, fake: Any) -> int | None:
        """The key of the tensor that `fake` stands for; None for one that was made on the way."""
        return self._keys.get(id(fake))

    def moved(self, device: torch.device) -> torch.device:
        """Where a tensor goes that was on `device`."""
        return self.device if device.type in (self._home, "meta") else device

    def _make(self, info: TensorInfo, device: torch.device) -> Tensor:
        if info.packed is not None:
            return nn.Parameter(_packed(info, device), requires_grad=False)
        fake = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=device)
        if info.is_parameter:
            return nn.Parameter(fake, requires_grad=info.requires_grad)
        return fake.requires_grad_(info.requires_grad)


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, fakes: Fakes) -> None:
        super().__init__(io.BytesIO(data))
        self._fakes = fakes

    def persistent_load(self, written: tuple[str, Any]) -> Any:
        """What stands for what request.Writer wrote in place of a tensor, a device or a code object."""
        kind, content = written
        if kind == "code":
            return marshal.loads(content)
        return self._fakes.of(content) if kind == "tensor" else self._fakes.moved(torch.device(content))


def _packed(info: TensorInfo, device: torch.device) -> PackedTensor:
    spec, scale_shape = info.packed  # type: ignore[misc]
    fmt = get_format(spec.format)
    spec = spec._replace(layout=layout_for(device, spec.dtype, fmt))
    codes = torch.empty(scale_shape[1], spec.k, dtype=torch.uint8, device=device)
    return PackedTensor(pack(codes, fmt, spec.layout), torch.empty(scale_shape, device=device), spec)
