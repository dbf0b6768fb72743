"""The custom operators `fp6::mm` and `fp6::dequantize`: schemas, fake kernels, eager implementations, the gradient for x.

Both read a packed weight [N, K]: `planes` in the given `layout` (packing.py), `scale` [G, N] float32, the format's name,
and `group_size` (None: one group, the row).

    fp6::dequantize(planes, scale, format, layout, group_size, k, dtype)  ->  [N, K] in dtype
    fp6::mm(x, planes, scale, format, layout, group_size)  ->  x @ dequantize(...).T, [*, K] -> [*, N] in x's dtype

The graph starts with dequantize and an ordinary matmul; the pass makes them fp6::mm. So dequantize *is* the meaning of a
packed weight, and mm may differ from it by the rounding of a float32 accumulation and nothing else.

Eager mm dequantizes some rows at a time (fp6::mm_by_rows), so that a 16-bit copy of the whole weight never exists; where the
layout is the one that a kernel reads on the tensors' device, it is the kernel: Triton on a GPU, and on a CPU C++, which
registers itself when the first call loads it (kernels/cpu).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fp6_compile._compat.torch import (
    AutoDispatchBelowAutograd,
    FrameAction,
    FrameExecStrategy,
    are_functorch_transforms_active,
    set_code_exec_strategy,
)
from fp6_compile.formats import get_format
from fp6_compile.kernels.cpu.build import load
from fp6_compile.kernels.triton.config import supports
from fp6_compile.layouts.packing import CPU, PLANES, gpu_layout, inputs_held, rows_per_index, unpack
from fp6_compile.quantize import dequantize as _dequantize

P = ParamSpec("P")
T = TypeVar("T")

_lib = torch.library.Library("fp6", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_lib.define(
    "dequantize(Tensor[] planes, Tensor scale, str format, str layout, int? group_size, SymInt k, ScalarType dtype)"
    " -> Tensor",
    tags=_TAGS,
)
for _name in ("mm", "mm_by_rows"):
    if not hasattr(torch.ops.fp6, _name):  # op.cpp defines mm, too, for processes that load the C++ library alone
        _lib.define(
            f"{_name}(Tensor x, Tensor[] planes, Tensor scale, str format, str layout, int? group_size) -> Tensor",
            tags=_TAGS,
        )

# Dequantized at a time: 1 MiB of float16, which stays in a core's second-level cache.
_BLOCK = 1 << 19


def _kernel(function: Callable[P, T]) -> Callable[P, T]:
    """Keeps Dynamo out: where it leaves a frame to Python, it would compile those that the frame calls, kernels too."""
    set_code_exec_strategy(function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))
    return function


@_kernel
def dequantize(
    planes: Sequence[Tensor],
    scale: Tensor,
    format: str,
    layout: str,
    group_size: int | None,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, k] in `dtype`: code values times scale in float32, rounded once. Any device."""
    _check(k, planes, scale, format, layout, group_size)
    n = scale.shape[1]
    fmt = get_format(format)
    return _dequantize(unpack(planes, fmt, layout, n, k), scale, fmt, group_size, dtype)


@_kernel
def mm_by_rows(
    x: Tensor, planes: Sequence[Tensor], scale: Tensor, format: str, layout: str, group_size: int | None
) -> Tensor:
    """`x @ W.T` with x [*, K] -> [*, N], a block of rows of W at a time. Any device, layout, strides and group size."""
    k, n = x.shape[-1], scale.shape[1]
    out = x.new_empty(*x.shape[:-1], n)
    if x.dtype == torch.float16 and x.device.type == "cpu" and _beyond_fp16(scale, format):
        x = x.float()
    for index, rows in _row_blocks(n, k, rows_per_index(layout)):
        w = dequantize([plane[index] for plane in planes], scale[:, rows], format, layout, group_size, k, x.dtype)
        out[..., rows] = F.linear(x, w)
    return out


def _beyond_fp16(scale: Tensor, format: str) -> bool:
    """Whether weights may be larger than any FP16 number: inf - inf would make sums of their products NaN."""
    largest = scale.abs().max() if scale.numel() else 0
    return bool(largest * get_format(format).max > torch.finfo(torch.float16).max)


@_kernel
def mm_on_gpu(
    x: Tensor, planes: Sequence[Tensor], scale: Tensor, format: str, layout: str, group_size: int | None
) -> Tensor:
    """`x @ W.T` by the Triton kernel, its tile chosen by M at run time; by rows where the kernel cannot."""
    if not has_kernel(x.device, x.dtype, layout, group_size):
        return mm_by_rows(x, planes, scale, format, layout, group_size)
    from fp6_compile.kernels.selection import launch  # here, because it imports Triton

    _check(x.shape[-1], planes, scale, format, layout, group_size)
    out = launch.mm(x.reshape(-1, x.shape[-1]), planes, scale, get_format(format), group_size)
    return out.view(*x.shape[:-1], scale.shape[1])


def mm_by_aten(x: Tensor, *tensors: Tensor, format: str, group_size: int | None) -> Tensor:
    """`x @ W.T` of x [M, K] on a GPU by a dequantized copy. Inductor times it against the kernel, so it gets its scratch."""
    count = len(get_format(format).planes)
    from fp6_compile.kernels.selection import launch

    return launch.aten_mm(x, tensors[:count], tensors[count], get_format(format), group_size)


@_kernel
def mm_at_first(
    x: Tensor, planes: Sequence[Tensor], scale: Tensor, format: str, layout: str, group_size: int | None
) -> Tensor:
    """`x @ W.T` where no kernel is registered: on a CPU the C++ one is now; by rows elsewhere, and without a compiler."""
    if x.device.type == "cpu" and layout in (CPU, PLANES) and load():
        return torch.ops.fp6.mm(x, planes, scale, format, layout, group_size)
    return mm_by_rows(x, planes, scale, format, layout, group_size)


def has_kernel(device: torch.device, dtype: torch.dtype, layout: str, group_size: int | None) -> bool:
    """Whether the GPU kernel reads `layout` for activations of `dtype`; each layout holds the lanes of one compute dtype."""
    return device.type == "cuda" and layout == gpu_layout(dtype) and supports(group_size) is None


def _check(
    k: int | SymInt, planes: Sequence[Tensor], scale: Tensor, format: str, layout: str, group_size: int | None
) -> None:
    fmt = get_format(format)
    torch._check_value(
        len(planes) == len(fmt.planes), lambda: f"fp6: got {len(planes)} planes, {format} has {len(fmt.planes)}"
    )
    stored = inputs_held(planes, fmt, layout)
    torch._check(
        -(-k // stored.granularity) * stored.granularity == stored.inputs,
        lambda: f"fp6: x has {k} features, but the weight was packed with {stored.inputs} inputs, padding included",
    )
    groups = 1 if group_size is None else -(-k // group_size)
    torch._check(
        scale.shape[0] == groups,
        lambda: f"fp6: scale has {scale.shape[0]} groups, {k} inputs in groups of {group_size} need {groups}",
    )


def _row_blocks(n: int, k: int, granularity: int) -> Iterator[tuple[slice, slice]]:
    """(slice of the planes' leading dimension, slice of rows) that together cover n rows."""
    step = max(1, _BLOCK // max(k, 1) // granularity)
    for i in range(0, -(-n // granularity), step):
        yield slice(i, i + step), slice(i * granularity, min((i + step) * granularity, n))


_lib.impl("dequantize", dequantize, "CompositeExplicitAutograd")
_lib.impl("mm_by_rows", mm_by_rows, "CompositeExplicitAutograd")
_lib.impl("mm", mm_at_first, "CompositeExplicitAutograd")
_lib.impl("mm", mm_on_gpu, "CUDA")


@torch.library.register_fake("fp6::dequantize", lib=_lib)
def _(
    planes: Sequence[Tensor],
    scale: Tensor,
    format: str,
    layout: str,
    group_size: int | None,
    k: int | SymInt,
    dtype: torch.dtype,
) -> Tensor:
    _check(k, planes, scale, format, layout, group_size)
    return scale.new_empty(scale.shape[1], k, dtype=dtype)


@torch.library.register_fake("fp6::mm", lib=_lib)
def _(x: Tensor, planes: Sequence[Tensor], scale: Tensor, format: str, layout: str, group_size: int | None) -> Tensor:
    _check(x.shape[-1], planes, scale, format, layout, group_size)
    return x.new_empty(*x.shape[:-1], scale.shape[1])


class _MM(torch.autograd.Function):
    """fp6::mm where x wants its gradient. Planes and scale are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, planes: Sequence[Tensor], scale: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(*planes, scale)
        ctx.how, ctx.k = how, x.shape[-1]
        return _below_autograd(x, planes, scale, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *planes, scale = ctx.saved_tensors
        w = torch.ops.fp6.dequantize(planes, scale, *ctx.how, ctx.k, grad.dtype)
        return grad @ w, *[None] * (2 + len(ctx.how))


@_kernel
def _mm_for_autograd(x: Tensor, *packed: Any) -> Tensor:
    """fp6::mm with all of torch's derivatives: the usual one of x, forward-mode ones, and those of torch.func."""
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if dual or are_functorch_transforms_active():
        return F.linear(x, torch.ops.fp6.dequantize(*packed, x.shape[-1], x.dtype))
    if x.requires_grad and torch.is_grad_enabled():
        return _MM.apply(x, *packed)
    return _below_autograd(x, *packed)


def _below_autograd(x: Tensor, *packed: Any) -> Tensor:
    with AutoDispatchBelowAutograd():
        return torch.ops.fp6.mm.default(x, *packed)


_lib.impl("mm", _mm_for_autograd, "Autograd")


@torch.library.register_vmap("fp6::mm", lib=_lib)
def _(info: Any, in_dims: Any, x: Tensor, *packed: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in tree_leaves(in_dims[1:])):
        return _one_by_one(torch.ops.fp6.mm, info.batch_size, in_dims, (x, *packed))
    return torch.ops.fp6.mm(x.movedim(in_dims[0], 0), *packed), 0


@torch.library.register_vmap("fp6::dequantize", lib=_lib)
def _(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    return _one_by_one(torch.ops.fp6.dequantize, info.batch_size, in_dims, args)


def _one_by_one(op: Any, count: int, in_dims: Any, args: Any) -> tuple[Tensor, int]:
    """`op` of weights that are vmapped over."""
    flat, spec = tree_flatten(args)
    dims = tree_leaves(in_dims)
    calls = ([a if d is None else a.select(d, i) for a, d in zip(flat, dims, strict=True)] for i in range(count))
    return torch.stack([op(*tree_unflatten(call, spec)) for call in calls]), 0
