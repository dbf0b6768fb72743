"""Parts of packed weights: slices, and pieces joined or padded into one weight.

A part is cut out of the codes and packed anew: it is the packing of the slice, and holds on to no memory of the whole.
Groups of inputs that share a scale are never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import pack, rows_per_index
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.packed.dispatch import implements, same_planes
from fp6_compile.packed.held import PackedBase

aten = torch.ops.aten


@implements(aten.slice.Tensor)
def _slice(func: Any, args: Any, kwargs: Any) -> Tensor:
    weight, dim, start, stop, step = [*args, None, None, None, None][:5]
    index = slice(start, stop, step).indices(weight.shape[(dim or 0) % 2])
    return _cut(weight, (dim or 0) % 2, *index)


@implements(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    weight, sizes = args[:2]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % 2
    length = weight.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    if sum(sizes) != length:
        raise ValueError(f"fp6: sizes {sizes} do not add up to the {length} of {weight!r} along dimension {dim}")
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return [_cut(weight, dim, stop - size, stop, 1) for size, stop in zip(sizes, stops, strict=True)]


def _cut(weight: PackedBase, dim: int, start: int, stop: int, step: int) -> Tensor:
    """Rows or inputs from `start` to `stop`, packed by themselves."""
    stop = max(start, stop)
    if step != 1:
        raise ValueError(f"fp6: {weight!r} is sliced with step {step}, only 1 is possible")
    # Slices are views to autograd: see dispatch.viewed.
    with torch.inference_mode(weight.is_inference()):
        return _part(weight, _is_rows(weight, dim), start, stop)


def _is_rows(weight: PackedBase, dim: int) -> bool:
    """Whether dimension `dim` of the weight, which may be transposed, is that of its rows."""
    return (dim % 2 == 0) != weight.spec.transposed


def _part(weight: PackedBase, rows: bool, start: int, stop: int) -> Tensor:
    spec = weight.spec
    if (start, stop) == (0, weight.scale.shape[1] if rows else spec.k):
        return same_planes(weight)
    weight = weight.map(lambda t: t)  # of one state, whatever other threads write
    codes, scale, size = weight.codes(), weight.scale, spec.group_size
    if rows:
        codes, scale = codes[start:stop], scale[:, start:stop].contiguous()
    else:
        if size is not None:
            if start % size or (stop % size and stop != spec.k):
                raise ValueError(
                    f"fp6: inputs {start} to {stop} of {weight!r} cut a group: slices along K start and stop at a "
                    f"multiple of group_size={size}, or at the end"
                )
            scale = scale[start // size : -(-stop // size)].contiguous()
        codes = codes[:, start:stop]
    part = _packed(weight, codes, scale.clone())
    part.is_part = True
    return part


def _packed(weight: PackedBase, codes: Tensor, scale: Tensor) -> PackedBase:
    """Other codes [N, K] and scales [G, N], packed as `weight` is."""
    spec = weight.spec
    planes = pack(codes, get_format(spec.format), spec.layout)
    return type(weight)(planes, scale, spec._replace(k=codes.shape[1]))


@implements(aten.cat.default)
def _cat(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Weights side by side along rows or inputs: the inverse of _split."""
    weights, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = weights[0]
    if not all(isinstance(w, PackedBase) and _how(w) == _how(first) for w in weights):
        raise ValueError("fp6: cat joins packed weights of one format, group_size and dtype; .dequantize() them")
    weights = [weight.repack(first.spec.layout) for weight in weights]
    return join_rows(weights) if _is_rows(first, dim) else _join_inputs(weights)


def _how(weight: PackedBase) -> PackingSpec:
    """How it is packed, whatever its layout and inputs."""
    return weight.spec._replace(layout="", k=0)


def join_rows(weights: Sequence[PackedBase]) -> PackedBase:
    """Weights [N, K] one above the other."""
    first = weights[0]
    if any(weight.spec != first.spec for weight in weights):
        raise ValueError(f"fp6: the rows of {', '.join(map(repr, weights))} cannot be joined")
    scale = torch.cat([weight.scale for weight in weights], 1)
    if any(weight.scale.shape[1] % rows_per_index(first.spec.layout) for weight in weights[:-1]):
        return _packed(first, torch.cat([weight.codes() for weight in weights]), scale)
    planes = [torch.cat(parts) for parts in zip(*(weight.planes for weight in weights), strict=True)]
    return type(first)(planes, scale, first.spec)


def _join_inputs(weights: Sequence[PackedBase]) -> PackedBase:
    first, size = weights[0], weights[0].spec.group_size
    scale = first.scale
    if size is None:
        # One scale for the whole of a row: shards along K have copies of it.
        if not all(torch.equal(weight.scale, scale) for weight in weights):
            raise ValueError(
                "fp6: packed weights without groups are joined along K only if their rows have the same scales: "
                ".dequantize() them, and PackedTensor.quantize what they make"
            )
    elif any(weight.spec.k % size for weight in weights[:-1]):
        raise ValueError(f"fp6: packed weights joined along K must end with a whole group of {size}, but for the last")
    else:
        scale = torch.cat([weight.scale for weight in weights])
    return _packed(first, torch.cat([weight.codes() for weight in weights], 1), scale)


@implements(aten.constant_pad_nd.default)
def _pad(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Zero rows or inputs at the end, as collectives of uneven shards ask for."""
    weight, (before_1, after_1, before_0, after_0) = args[0], [*args[1], 0, 0, 0, 0][:4]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    if value != 0 or before_0 or before_1 or min(after_0, after_1) < 0:
        raise NotImplementedError(
            f"fp6: {weight!r} can be padded with zeros, at the end; weight.dequantize() otherwise"
        )
    rows, inputs = (after_1, after_0) if weight.spec.transposed else (after_0, after_1)
    codes, size = F.pad(weight.codes(), (0, inputs, 0, rows)), weight.spec.group_size
    groups = 0 if size is None else -(-codes.shape[1] // size) - len(weight.scale)
    return _packed(weight, codes, F.pad(weight.scale, (0, rows, 0, groups)))
