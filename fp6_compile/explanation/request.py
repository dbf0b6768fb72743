"""A call as bytes that another process can read: the model's code and structure, and what its tensors look like.

No values are sent, so the bytes are few whatever the size of the model. A tensor that occurs twice is one tensor there, too.

Pickle sends classes and functions by their name in a module. With cloudpickle (the extra `explain`) those of `__main__`, of
notebooks and of functions are sent as code; without it such a model is a ValueError.
"""

from __future__ import annotations

import io
import marshal
import pickle
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp6_compile.fake_gpu.devices import Device
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.packed.tensor import PackedTensor

try:
    from cloudpickle import Pickler as _Pickler
except ImportError:
    _Pickler = pickle.Pickler
_BY_VALUE = _Pickler is not pickle.Pickler


@dataclass(frozen=True)
class Request:
    """What the process that explains is given: the device, and the call as bytes.

    about: the device to explain for. target: the type of device that its tensors are on, "cuda" or "cpu". home: the type
    that the model's are on here. call: (model, args, kwargs, Options, Settings), written by `Writer`.
    """

    about: Device
    target: str
    home: str
    call: bytes


class TensorInfo(NamedTuple):
    """What a tensor looks like. `key` is its place in `Writer.tensors`; `marks` are Dynamo's, such as mark_dynamic's.

    packed: of a PackedTensor, (spec, shape of its scale).
    """

    key: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool
    is_parameter: bool
    packed: tuple[PackingSpec, tuple[int, ...]] | None
    marks: dict[str, Any]


class Writer(_Pickler):
    """Writes `data`: any object, with a TensorInfo for each tensor. `tensors` are those tensors.

    Raises ValueError for what cannot be sent to another process, such as a model that holds a lock or a generator.
    """

    def __init__(self, value: Any) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file)
        self.tensors: list[Tensor] = []
        self._infos: dict[int, TensorInfo] = {}
        try:
            self.dump(value)
        except (TypeError, AttributeError, RuntimeError, NotImplementedError, pickle.PicklingError) as error:
            raise cannot_copy(error) from error

    @property
    def data(self) -> bytes:
        """What was written."""
        return self._file.getvalue()

    def persistent_id(self, value: Any) -> tuple[str, Any] | None:
        """What is written in place of `value`, for fakes.Reader; None for what pickle writes as always."""
        if isinstance(value, Tensor):
            if id(value) not in self._infos:
                self._infos[id(value)] = _info(value, len(self.tensors))
                self.tensors.append(value)
            return "tensor", self._infos[id(value)]
        if isinstance(
            value, torch.device
        ):  # a device that an object keeps, as a static cache does, moves with its tensors
            return "device", str(value)
        if isinstance(value, types.CodeType):  # cloudpickle would leave out its file, which a graph break's line is in
            return "code", marshal.dumps(value)
        if not _BY_VALUE and isinstance(value, (type, types.FunctionType)) and value.__module__ == "__main__":
            raise pickle.PicklingError(f"{value.__qualname__} is defined in __main__")
        return None


def cannot_copy(error: Exception) -> ValueError:
    """The error for a call that cannot be sent to another process."""
    hint = "" if _BY_VALUE else "; with the package cloudpickle installed, more can be copied"
    return ValueError(f"fp6: explain looks at a copy without values, and copying failed: {error}{hint}")


def _info(tensor: Tensor, key: int) -> TensorInfo:
    is_parameter = isinstance(tensor, nn.Parameter)
    packed = (tensor.spec, tuple(tensor.scale.shape)) if isinstance(tensor, PackedTensor) else None
    return TensorInfo(
        key=key,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        dtype=tensor.dtype,
        device=str(tensor.device),
        requires_grad=tensor.requires_grad and (is_parameter or tensor.is_leaf),
        is_parameter=is_parameter,
        packed=packed,
        marks={name: mark for name, mark in vars(tensor).items() if name.startswith("_dynamo_")},
    )
