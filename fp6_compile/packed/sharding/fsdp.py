"""Packed weights under FSDP2 (torch.distributed.fsdp.fully_shard), which keeps rows of each in every process.

Before a forward it gathers what `shard` returns of every process, lets `gathered` make the weight of it, and frees its
memory afterwards (torch/distributed/fsdp/_fully_shard/_fsdp_param.py: "FSDP tensors"). Bit planes are gathered, six bits a
weight, in the layout that the kernel reads. A weight that is made once is filled anew for every forward: compiled graphs
and autograd know its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fp6_compile._compat.torch import unsafe_preserve_version_counter
from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import PLANES, layout_for, rows_per_index
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.packed.dispatch import implements, viewed
from fp6_compile.packed.held import PackedBase

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

aten = torch.ops.aten


class Shard(NamedTuple):
    """What is gathered of this process's rows, scales as [N, G]; and how to read it."""

    tensors: tuple[Tensor, ...]
    spec: PackingSpec


class Shardable(PackedBase):
    """What fully_shard asks of a tensor subclass: these two methods, by these names."""

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: tuple[int, ...], module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Shard]:
        """What is gathered of this shard of a weight of `outer_size`."""
        own = shard(self, mesh.size(), outer_size)
        return own.tensors, own

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Shard, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]] | None:
        """The weight that was gathered; in `out`, where there is one."""
        weight, own = gathered(type(self), outputs, metadata, param_dtype)
        if out is None:
            return weight, own
        fill(out, weight)
        return None


def shard(weight: PackedBase, world_size: int, size: torch.Size) -> Shard:
    """The rows of a weight of `size` that this process has.

    Raises ValueError if it is not an equal share of the rows.
    """
    if weight.shape[0] * world_size != size[0] or weight.shape[1] != size[1]:
        raise _uneven(size, weight.shape)
    if weight.shape[0] % rows_per_index(weight.spec.layout):
        weight = weight.repack(PLANES)  # one row an index, so that shards lie side by side without gaps
    *planes, scale = weight.tensors
    return Shard((*(plane.contiguous() for plane in planes), scale.t().contiguous()), weight.spec)


def gathered(
    cls: type[PackedBase], outputs: Sequence[Tensor], shard: Shard, dtype: torch.dtype
) -> tuple[PackedBase, list[Tensor]]:
    """The whole weight, presented in `dtype`, and those of its tensors that do not lie in `outputs`."""
    # of a single process, whose shard is the whole, FSDP copies the first tensor only
    *planes, scale = (*outputs, *(tensor.clone() for tensor in shard.tensors[len(outputs) :]))
    spec = shard.spec
    scale = scale.view(1, -1) if scale.shape[1] == 1 else scale.t().contiguous()
    weight = cls(planes, scale, spec._replace(dtype=dtype))
    weight = weight.repack(layout_for(scale.device, dtype, get_format(spec.format)))
    weight._held.is_lent = True
    theirs = {tensor.untyped_storage().data_ptr() for tensor in outputs}
    return weight, [tensor for tensor in weight.tensors if tensor.untyped_storage().data_ptr() not in theirs]


def fill(out: Tensor, weight: PackedBase) -> None:
    """Give `out`, made by an earlier `gathered`, the values of `weight`; those in the outputs it has already."""
    packed: Any = getattr(out, "_local_tensor", out)  # a DTensor's, with tensor parallelism
    for mine, theirs in zip(packed.tensors, weight.tensors, strict=True):
        if mine.data_ptr() != theirs.data_ptr():
            with torch.no_grad(), unsafe_preserve_version_counter((mine,)):
                mine.copy_(theirs)


def _uneven(size: Sequence[int], shard: Sequence[int]) -> ValueError:
    return ValueError(
        f"fp6: fully_shard cannot cut a packed weight {list(size)} into shards such as {list(shard)}: it cuts rows, into "
        "equal shares. Leave it whole with fully_shard(..., ignored_params={weight}), or unpacked with quantize_(skip=...)"
    )


@implements(aten.new_zeros.default)
def _new_zeros(func: Any, args: Any, kwargs: Any) -> Tensor:
    """A shard to be filled: fully_shard asks for one in every process, so that all raise the same error."""
    weight, size = args[:2]
    if len(size) != 2 or size[1] != weight.shape[1] or weight.shape[0] % size[0]:
        raise _uneven(weight.shape, size)
    new: Tensor = weight.narrow(0, 0, size[0]).clone()
    return new


@implements(aten.new_empty.default)
def _new_empty(func: Any, args: Any, kwargs: Any) -> Tensor:
    """fully_shard has more processes than the weight has rows."""
    raise _uneven(args[0].shape, args[1])


@implements(aten.as_strided.default)
def _as_strided(func: Any, args: Any, kwargs: Any) -> Tensor:
    weight, size, stride, offset = [*args, kwargs.get("storage_offset")][:4]
    if list(size) != list(weight.shape) or list(stride) != list(weight.stride()) or offset:
        raise NotImplementedError(f"fp6: {weight!r} has no strides; weight.dequantize() has")
    return viewed(func, (weight,), {})


@implements(aten.view.default, aten._unsafe_view.default)
def _view(func: Any, args: Any, kwargs: Any) -> Tensor:
    weight, shape = args
    if list(shape) == [-1]:
        return Flat(weight.planes, weight.scale, weight.spec)
    if weight.shape != torch.Size(shape) and list(shape) != [-1, weight.shape[1]]:
        raise NotImplementedError(f"fp6: {weight!r} cannot be viewed as {list(shape)}; weight.dequantize() can")
    return viewed(func, args, kwargs)


class Flat(PackedBase):
    """`weight.view(-1)`: fully_shard makes one and does nothing with it. Nothing can be done with it."""

    @staticmethod
    def __new__(cls, planes: Sequence[Tensor], scale: Tensor, spec: PackingSpec) -> Flat:
        size = scale.shape[1] * spec.k
        return torch.Tensor._make_wrapper_subclass(cls, (size,), dtype=spec.dtype, device=scale.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"fp6: {func} is not defined for a packed weight in one dimension; .dequantize() it")
