"""What a PackedTensor can do: one function for each operator. Any other operator is an error that says the way out.

A copy or a view keeps the codes; a matmul of the transposed weight is `fp6::mm`; slices, and what torch.distributed does
with them, are in sharding/. Composite operators, such as `linear`, `chunk` or `narrow`, are decomposed into these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fp6_compile._compat.torch import (
    DisableTorchFunctionSubclass,
    dispatch_has_kernel_for_dispatch_key,
    return_and_correct_aliasing,
)
from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import layout_for
from fp6_compile.packed.held import PackedBase

aten = torch.ops.aten
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator `func` of arguments of which at least one is a PackedTensor.

    Raises NotImplementedError, naming the operator and the way out, for one that nobody implements.
    """
    implementation = _IMPLEMENTATIONS.get(func) or _IMPLEMENTATIONS.get(func.name())
    if implementation is not None:
        return implementation(func, args, kwargs)
    if dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)
    weight = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PackedBase))
    raise NotImplementedError(
        f"fp6: {func} is not defined for {weight!r}; it can multiply (F.linear, x @ W.T), move, be copied and sliced. "
        "weight.dequantize() is an ordinary tensor"
    )


def linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """F.linear of arguments of which at least one is a PackedTensor."""
    if not isinstance(weight, PackedBase) or weight.spec.transposed:
        with DisableTorchFunctionSubclass():
            return F.linear(input, weight, bias)
    out = mm(input, weight)
    return out if bias is None else out + bias.to(out.dtype)


def mm(x: Tensor, weight: PackedBase) -> Tensor:
    """`x @ W.T`: PackedTensor.mm."""
    spec = weight.spec
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != spec.dtype:
        raise RuntimeError(f"fp6: x is {x.dtype} and the packed weight {spec.dtype}; convert either with .to(dtype)")
    *planes, scale = weight.tensors
    if x.shape[-1:] != (spec.k,):  # planes are padded: fp6::mm cannot tell
        has = f"{int(x.shape[-1])} features" if x.dim() else "no features"
        raise RuntimeError(f"fp6: x has {has}, the weight [{scale.shape[1]}, {spec.k}] takes {spec.k}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise RuntimeError("fp6: a packed weight cannot be trained: leave requires_grad False")
    product: Tensor = torch.ops.fp6.mm(x, planes, scale, spec.format, spec.layout, spec.group_size)
    return product


def implements(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of operators, or of names of those that are there only when torch.distributed is."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _IMPLEMENTATIONS.update(dict.fromkeys(operators, function))
        return function

    return register


@implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: Any, kwargs: Any) -> Tensor:
    return viewed(func, args, kwargs)


def viewed(func: Any, args: Any, kwargs: Any, **changes: Any) -> Tensor:
    """A view of the weight args[0]; one of an ordinary tensor is an ordinary tensor in inference mode, too."""
    with torch.inference_mode(args[0].is_inference()):
        out = same_planes(args[0], **changes)
    view: Tensor = return_and_correct_aliasing(func, args, kwargs, out)
    return view


def same_planes(weight: PackedBase, **changes: Any) -> PackedBase:
    """Another tensor of the same bit planes: what is written into either is in both."""
    out = weight.map(lambda t: t, **changes)
    out._held, out.is_part = weight._held, weight.is_part
    return out


@implements(aten.clone.default)
def _clone(func: Any, args: Any, kwargs: Any) -> Tensor:
    weight: PackedBase = args[0]
    return weight.map(torch.clone)


@implements(aten._to_copy.default, aten.empty_like.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    weight: PackedBase = args[0]
    device = torch.device(kwargs.get("device") or weight.device)
    dtype = kwargs.get("dtype") or weight.dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"fp6: {weight!r} cannot become {dtype}, only float16, bfloat16 or float32")
    how: dict[str, Any] = {"non_blocking": kwargs.get("non_blocking") or False, "copy": True}
    make = torch.empty_like if func is aten.empty_like.default else partial(Tensor.to, **how)
    copy = weight.map(lambda t: make(t, device=device), dtype=dtype)
    return copy if device.type == "meta" else copy.repack(layout_for(device, dtype, get_format(weight.spec.format)))


@implements(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    return all(tensor.is_pinned() for tensor in args[0].tensors)


@implements(aten.view.dtype)
def _reinterpret(func: Any, args: Any, kwargs: Any) -> Tensor:
    raise NotImplementedError(no_bytes(args[0]))


def no_bytes(weight: PackedBase) -> str:
    """What to say to whoever wants a weight's memory: accelerate, to write it to disk."""
    return (
        f"fp6: {weight!r} is not in memory as a {weight.dtype} tensor is, which NumPy and accelerate's disk offload need: "
        "offload it to the CPU (device_map 'cpu'), or take weight.dequantize()"
    )


@implements(aten.copy_.default)
def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    same = isinstance(target, PackedBase) and isinstance(source, PackedBase) and target.shape == source.shape
    if not same or _meaning(target) != _meaning(source):
        raise ValueError(
            f"fp6: cannot copy {_describe(source)} into {_describe(target)}: only packed weights of one shape, format, "
            "group_size and dtype are copied in place. load_state_dict(..., assign=True) replaces weights; "
            "PackedTensor.quantize(weight) packs one"
        )
    if target.is_part:
        raise ValueError(
            f"fp6: cannot copy into {target!r}: it is cut out of another packed weight, which the copy would not reach. "
            "Write all of that weight, or a .clone() of the part; fp6_compile.planes_state_dict is loaded in any sharding"
        )
    target._held.write(source.repack(target.spec.layout).tensors)
    return target


def _meaning(weight: PackedBase) -> tuple[Any, ...]:
    return weight.spec._replace(layout="")


def _describe(value: Tensor) -> str:
    return repr(value) if isinstance(value, PackedBase) else f"a {value.dtype} tensor of shape {list(value.shape)}"


@implements(aten.equal.default)
def _equal(func: Any, args: Any, kwargs: Any) -> bool:
    one, other = args
    if not (isinstance(one, PackedBase) and isinstance(other, PackedBase) and one.shape == other.shape):
        return False
    if _meaning(one) != _meaning(other):
        return False
    return torch.equal(one.codes(), other.codes()) and torch.equal(one.scale, other.scale)


@implements(aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
def _transpose(func: Any, args: Any, kwargs: Any) -> Tensor:
    weight, dims = args[0], [d % 2 for d in tree_leaves(args[1:])]
    flips = dims != [0, 0] and dims != [1, 1] and not (func is aten.permute.default and dims == [0, 1])
    return viewed(func, args, kwargs, transposed=weight.spec.transposed != flips)


@implements(aten.mm.default)
def _mm(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight = args
    if not isinstance(weight, PackedBase):
        # W @ x, [N, K] by [K, M]; autograd's x.grad of F.linear is the other way round.
        return _mm(func, (weight.t(), x.t()), {}).t()
    if weight.spec.transposed:
        return mm(x, weight)
    return x @ weight.dequantize()


@implements(aten.addmm.default)
def _addmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, x, weight = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    product = _mm(func, (x, weight), {})
    return (product if alpha == 1 else product * alpha) + (bias if beta == 1 else beta * bias)


@implements(aten.mv.default)
def _mv(func: Any, args: Any, kwargs: Any) -> Any:
    weight, x = args
    return _mm(func, (x.unsqueeze(0), weight.t()), {}).squeeze(0)
