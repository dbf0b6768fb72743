"""What a chain of views in an ATen graph shows of a dequantized weight: not matched, but replayed on a meta tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node, map_arg

aten, fp6, prims = torch.ops.aten, torch.ops.fp6, torch.ops.prims

VIEWS = (
    *(aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.reshape.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten._unsafe_view.default),
    aten.slice.Tensor,
)
# Casts and copies change no value that the matmul would not round again: fp6::mm rounds the weight to x's dtype, once.
COPIES = (prims.convert_element_type.default, aten._to_copy.default, aten.clone.default, aten.alias.default)


def presented_weight(node: Node) -> tuple[Node, Tensor] | None:
    """The `fp6::dequantize` under a chain of views, and a meta tensor with the strides of what `node` shows of it."""
    chain = []
    while node.target in (*VIEWS, *COPIES):
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not fp6.dequantize.default:
        return None
    shown = torch.empty(node.meta["val"].shape, device="meta")
    for view in reversed([v for v in chain if v.target in VIEWS]):
        # Sizes that are not known may only be those of leading dimensions, which are broadcast; any example will do.
        sizes = {
            size: getattr(getattr(size.meta["val"], "node", None), "hint", None) for size in view.all_input_nodes[1:]
        }
        if not all(isinstance(size, int) for size in (*view.meta["val"].shape[-2:], *sizes.values())):
            return None
        args, kwargs = map_arg((view.args[1:], view.kwargs), sizes.__getitem__)
        shown = view.target(shown, *args, **kwargs)  # type: ignore[operator]
    return node, shown


def rows_shown(node: Node, rows_first: bool) -> range | None:
    """The rows of a dequantized weight that `node` shows, as [..., rows, K] (rows_first) or [..., K, rows], or None.

    The leading dimensions must be broadcast.
    """
    found = presented_weight(node) if isinstance(node, Node) else None
    if found is None:
        return None
    dequantize, shown = found
    k = dequantize.meta["val"].shape[1]
    matrix = shown if rows_first else shown.mT
    rows, first = matrix.shape[-2], shown.storage_offset() // k
    # Sizes and strides that matter must be those of a stretch of rows.
    sizes, strides = (*shown.shape[:-2], rows, k), (*[0] * (shown.dim() - 2), k, 1)
    same = all(size == 1 or a == b for size, a, b in zip(sizes, matrix.stride(), strides, strict=True))
    if matrix.shape != sizes or not same or shown.storage_offset() % k:
        return None
    return range(first, first + rows)
