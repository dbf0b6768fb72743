"""A packed weight in a folder: which tensors it is stored as, and how they are read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import PLANES, canonical_shapes, plane_names
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.packed.held import PackedBase
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.storage.files import short
from fp6_compile.storage.safetensors import Entry

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}


class CheckpointError(ValueError):
    """A folder that is no checkpoint, is damaged, or does not fit the model: the message says which file or tensor."""


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight of a checkpoint: its canonical bit planes have `rows` rows and are read as `spec` says."""

    spec: PackingSpec
    rows: int

    @classmethod
    def of(cls, packed: PackedBase) -> PackedWeight:
        """How a PackedTensor is stored."""
        return cls(packed.spec._replace(layout=PLANES), packed.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        return self.rows, self.spec.k

    @property
    def dtype(self) -> torch.dtype:
        """What it is presented in."""
        return self.spec.dtype

    def tensors(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What the weight `name` is stored as, in order: bit planes `name_w4`, `name_w2`, ... and `name_scale` [N, G].

        Plain names without a dot after the weight's, so that they can be parameters of a module; and scales that have, like
        bit planes, outputs along dimension 0 and inputs along dimension 1, so that all are sharded in the same way.
        """
        shapes = canonical_shapes(get_format(self.spec.format), *self.shape)
        names = plane_names(get_format(self.spec.format))
        planes = {f"{name}_{plane}": (torch.uint8, shape) for plane, shape in zip(names, shapes, strict=True)}
        return {**planes, f"{name}_scale": (torch.float32, (self.rows, self._groups))}

    @property
    def _groups(self) -> int:
        group_size = self.spec.group_size
        return 1 if group_size is None else -(-self.spec.k // group_size)

    def stored(self, packed: PackedBase) -> tuple[Tensor, ...]:
        """The values of `tensors`, in the same order."""
        canonical = packed.repack(PLANES)
        return *canonical.planes, canonical.scale.t().contiguous()

    def read(self, name: str, entries: Mapping[str, Entry], device: torch.device | str = "cpu") -> PackedTensor:
        """The weight, on `device` and in its layout, from the tensors of a folder."""
        *planes, scale = (entries[stored].read(device) for stored in self.tensors(name))
        return self.packed(planes, scale)

    def packed(self, planes: list[Tensor], scale: Tensor) -> PackedTensor:
        """The weight in the layout of its device, from the values of `tensors`."""
        spec = self.spec
        scale = scale.t().contiguous()
        return PackedTensor.from_planes(planes, scale, spec.format, spec.group_size, spec.k, spec.dtype)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether it can stand for a parameter of `dtype`."""
        return dtype in _DTYPES.values()

    def to_json(self) -> dict[str, Any]:
        """As it stands in a shard's metadata."""
        spec, dtype = self.spec, str(self.dtype).removeprefix("torch.")
        return {"format": spec.format, "group_size": spec.group_size, "shape": list(self.shape), "dtype": dtype}

    @classmethod
    def from_json(cls, name: str, value: Any) -> PackedWeight:
        """Raises CheckpointError for anything but what `to_json` gives."""
        try:
            n, k = value["shape"]
            group_size = value["group_size"]
            weight = cls(PackingSpec(value["format"], PLANES, group_size, k, _DTYPES[value["dtype"]]), n)
            get_format(value["format"])
            sizes = [n, k, *([] if group_size is None else [group_size])]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"shape {[n, k]} and group_size {group_size} are not positive integers")
            if weight.to_json() != value:
                raise ValueError(f"expected {weight.to_json()}, found {value}")
            return weight
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"fp6: {short(name)}: not a packed weight this version can read: {type(error).__name__}: {short(error)}"
            ) from error
