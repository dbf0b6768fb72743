"""A packed weight as a tensor: what `quantize_` puts in the place of an nn.Linear's weight.

    PackedTensor [N, K], float16        what everyone sees: shape, dtype, device of the weight it stands for
        w4, w2 (or others)              the bit planes of its format, in the layout of its device (packing.py)
        scale [G, N] float32

It is an nn.Parameter like any other: it moves, is copied, saved, tied, sliced and sharded. Linear layers of it run
`fp6::mm`; what else it can do is in dispatch.py, and everything else raises an error that says so. Under torch.compile it
is a *traceable wrapper subclass* (torch/utils/_python_dispatch.py): its bit planes become inputs of the graph, and the graph
has a `fp6::mm` where the linear was, with any backend.

`.to(device)` repacks the bit planes into the layout that the device's kernel reads. `.to(dtype)` changes the dtype that the
weight is *presented in*, which activations must have and `dequantize()` rounds to; codes and scales stay as they are, so
that `.bfloat16().half()` loses nothing. Pickles hold canonical bit planes and are repacked where they are loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile import lowerings, ops  # noqa: F401  (ops defines fp6::mm)
from fp6_compile._compat.torch import INDUCTOR_LOWERING, DisableTorchFunctionSubclass
from fp6_compile.formats import AUTO, DEFAULT, get_format
from fp6_compile.kernels.pack import quantized
from fp6_compile.layouts import packing
from fp6_compile.layouts.packing import PLANES, layout_for, plane_names
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.packed import dispatch
from fp6_compile.packed.held import PackedBase
from fp6_compile.packed.sharding import collectives  # noqa: F401  (defines operators)
from fp6_compile.packed.sharding.fsdp import Shardable
from fp6_compile.quantize import check, choose_format

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DATA: Any = Tensor.data


class PackedTensor(Shardable):
    """A weight [N, K] (or, transposed, [K, N]) in bit planes; see this module's docstring.

    Args:
        planes: the bit planes of `spec.format` in `spec.layout`, as `packing.pack` returns them.
        scale: [G, N] float32, on the device of the bit planes.
        spec: how to read them.

    Or one packed weight, of which it becomes a parameter, as nn.Parameter does: accelerate and transformers call
    `type(old)(new, requires_grad=..., **vars(old))` to put one weight in the place of another.
    """

    @staticmethod
    def __new__(cls, planes: Any, scale: Any = None, spec: Any = None, **attributes: Any) -> PackedTensor:
        if isinstance(planes, PackedBase):
            return super().__new__(cls, planes.planes, planes.scale, planes.spec)
        if scale is None or spec is None:
            raise TypeError(
                f"fp6: a packed weight cannot become a {getattr(planes, 'dtype', type(planes).__name__)} tensor; "
                "PackedTensor.quantize(weight) packs one, and quantize_(model) all of a model"
            )
        return super().__new__(cls, planes, scale, spec, **attributes)

    def __init__(self, planes: Any, scale: Any = None, spec: Any = None, **attributes: Any) -> None:
        if isinstance(planes, PackedBase):
            self._held, self.spec, self.is_part = planes._held, planes.spec, planes.is_part
            self._is_param = True  # how nn.Parameter marks those that are not of its own class
        else:
            super().__init__(planes, scale, spec)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        format: str = DEFAULT,
        group_size: int | None = None,
        scale: str = "absmax",
        dtype: torch.dtype | None = None,
    ) -> PackedTensor:
        """`weight` [N, K] (float16, bfloat16 or float32) in the codes of `format` (or "auto", config.py), presented in
        `dtype` (by default its own).

        Raises ValueError as quantize.quantize does, and for other dtypes and unknown formats.
        """
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight: got {weight.dtype}, needs one of {', '.join(map(str, DTYPES))}")
        check(weight, group_size, scale)
        weight, dtype = weight.detach(), dtype or weight.dtype
        if format == "auto":
            format = choose_format([weight], [get_format(name) for name in AUTO], group_size, scale).name
        fmt, layout = get_format(format), layout_for(weight.device, dtype, get_format(format))
        spec = PackingSpec(format, layout, group_size, weight.shape[1], dtype)
        *planes, scales = quantized(weight, fmt, layout, group_size, scale)
        return cls(planes, scales, spec)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, format: str, group_size: int | None, dtype: torch.dtype
    ) -> PackedTensor:
        """From codes [N, K] (uint8) and scales [G, N] (float32), in the layout of their device."""
        fmt, (n, k) = get_format(format), codes.shape
        layout = layout_for(codes.device, dtype, fmt)
        planes = packing.pack_rows(lambda rows: codes[rows], n, k, codes.device, fmt, layout)
        return cls(planes, scale, PackingSpec(format, layout, group_size, k, dtype))

    @classmethod
    def from_planes(
        cls, planes: Sequence[Tensor], scale: Tensor, format: str, group_size: int | None, k: int, dtype: torch.dtype
    ) -> PackedTensor:
        """From canonical bit planes, as checkpoints hold them, in the layout of their device."""
        return cls(planes, scale, PackingSpec(format, PLANES, group_size, k, dtype)).repack(
            layout_for(scale.device, dtype, get_format(format))
        )

    def move_to(self, planes: Sequence[Tensor], scale: Tensor, source: tuple[Tensor, ...]) -> None:
        """Read from `planes` and `scale`, rows of larger ones (merging.py says why), unless written since it was `source`.

        Scales of groups stay: their rows would not be contiguous, and graphs that are compiled already count on it.
        """
        # no views to autograd, and the strides of a scale that lies alone
        scale = scale.data.view(-1).view(1, -1) if len(scale) == 1 else source[-1]
        self._held.replace(source, (*(plane.data for plane in planes), scale))

    def mm(self, x: Tensor) -> Tensor:
        """`x @ W.T` for x [*, K], whether it is transposed or not: `fp6::mm`. Autocast casts x, as it does for F.linear.

        Raises RuntimeError, as F.linear does, where x has not K features or another dtype.
        """
        return dispatch.mm(x, self)

    def requires_grad_(self, requires_grad: bool = True) -> PackedTensor:
        """Ignored: a packed weight is a constant. nn.Parameter and load_state_dict(assign=True) call this by themselves."""
        return self

    def __tensor_flatten__(self) -> tuple[list[str], PackingSpec]:
        return [*plane_names(get_format(self.spec.format)), "scale"], self.spec

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], spec: PackingSpec, size: Any, stride: Any) -> PackedTensor:
        if INDUCTOR_LOWERING in sys.modules:  # someone compiles with Inductor, by whatever backend
            lowerings.register()
        return cls([inner[name] for name in plane_names(get_format(spec.format))], inner["scale"], spec)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return dispatch.linear(*args, **(kwargs or {}))
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return dispatch.call(func, args, kwargs or {})

    def _stable_hash_for_caching(self) -> str:
        """What AOTAutograd's cache must know of it beside the metadata of its tensors: also what the graph makes of it."""
        from fp6_compile.lowerings import source_hash  # imports Inductor, which is imported where it caches

        return f"{self.spec} {source_hash().hex()}"

    def __repr__(self) -> str:  # type: ignore[override]
        spec, group = self.spec, f", group_size={self.spec.group_size}" if self.spec.group_size else ""
        return f"PackedTensor({list(self.shape)}, {self.dtype}, {spec.format}{group}, {spec.layout}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        if id(self) not in memo:
            memo[id(self)] = _like(self, self.clone())
        copy: PackedTensor = memo[id(self)]
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, self.repack(PLANES))

    def _set_data(self, value: Tensor) -> None:
        if not isinstance(value, PackedTensor):
            raise TypeError(
                f"fp6: .data of {self!r} cannot be a {value.dtype} tensor; PackedTensor.quantize(weight) packs one"
            )
        with DisableTorchFunctionSubclass():
            _DATA.__set__(self, value)
        self._held, self.spec = value._held, value.spec

    data = property(_DATA.__get__, _set_data)

    def numpy(self, *, force: bool = False) -> Any:
        """TypeError: a packed weight has no array."""
        raise TypeError(dispatch.no_bytes(self))

    def share_memory_(self) -> PackedTensor:
        """Move bit planes and scale to memory that processes share; a no-op where they are, and on GPUs."""
        for tensor in self.tensors:
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether other processes share bit planes and scale."""
        return all(tensor.is_shared() for tensor in self.tensors)


def _like(original: Tensor, packed: Tensor) -> Any:
    return torch.nn.Parameter(packed, requires_grad=False) if isinstance(original, torch.nn.Parameter) else packed


def _reduced(original: Tensor, packed: PackedTensor) -> tuple[Any, ...]:
    *planes, scale = packed.tensors
    return _rebuild, (tuple(planes), scale, tuple(packed.spec), isinstance(original, torch.nn.Parameter))


def _rebuild(planes: Sequence[Tensor], scale: Tensor, spec: tuple[Any, ...], is_parameter: bool) -> Tensor:
    """Unpickling, by the names in fp6_compile/__init__.py: in the layout of the device that the tensors were mapped to."""
    packed = PackedTensor(planes, scale, PackingSpec(*spec))
    packed = packed.repack(layout_for(packed.device, packed.dtype, get_format(packed.spec.format)))
    return torch.nn.Parameter(packed, requires_grad=False) if is_parameter else packed


# To another process on this machine it goes as a tensor does: bit planes as they are, in memory that both share.
ForkingPickler.register(PackedTensor, lambda packed: _reduced(packed, packed))
