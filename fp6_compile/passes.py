"""The graph pass: every matmul whose weight is a dequantized one becomes `fp6::mm`.

    before   permute = aten.permute(fp6.dequantize(w4, w2, scale, ...), [1, 0]);  addmm = aten.addmm(bias, x, permute)
    after    mm = fp6.mm(x, w4, w2, scale, ...);  add = aten.add(mm, bias)

It runs on AOTAutograd's joint graph, before Inductor's own passes touch matmuls. By then linear, matmul, einsum and Conv1D
are mm, addmm, bmm or mv with some chain of views on the weight. The chain is not matched against a list of known ones: it is
replayed on a meta tensor, and its strides tell whether it presents the weight [N, K] as the [K, N] that the matmul wants.

A dequantize that no matmul took is decomposed, so that Inductor fuses it like any pointwise computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import (
    Arg,
    CallFunction,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch.fx import Graph, Node

from fp6_compile import ops
from fp6_compile.report import count

aten, fp6, prims = torch.ops.aten, torch.ops.fp6, torch.ops.prims

_VIEWS = (
    *(aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.reshape.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten._unsafe_view.default),
)
# Casts and copies change no value that the matmul would not round again: fp6::mm rounds the weight to x's dtype, once.
_COPIES = (prims.convert_element_type.default, aten._to_copy.default, aten.clone.default, aten.alias.default)

_SOURCES = (".py", ".jinja", ".cpp", ".h")

_matmuls = PatternMatcherPass(pass_name="fp6_mm")
_leftovers = PatternMatcherPass(pass_name="fp6_dequantize")


def presented_weight(node: Node) -> tuple[Node, Tensor] | None:
    """The `fp6::dequantize` under a chain of views, and a meta tensor with the strides of what `node` shows of it."""
    chain = []
    while node.target in (*_VIEWS, *_COPIES):
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not fp6.dequantize.default:
        return None
    shown = torch.empty(node.meta["val"].shape, device="meta")
    for view in reversed([v for v in chain if v.target in _VIEWS]):
        if any(isinstance(arg, Node) for arg in view.all_input_nodes[1:]):
            return None
        shown = view.target(shown, *view.args[1:], **view.kwargs)  # type: ignore[operator]
    return node, shown


def _shows(node: Node, rows_first: bool) -> bool:
    """Whether `node` is a whole dequantized weight as [..., N, K] (rows_first) or [..., K, N], broadcast over the rest."""
    found = presented_weight(node) if isinstance(node, Node) else None
    if found is None:
        return False
    dequantize, shown = found
    n, k = dequantize.meta["val"].shape
    shape, strides = ((n, k), (k, 1)) if rows_first else ((k, n), (1, k))
    same = all(size == 1 or a == b for size, a, b in zip(shape, shown.stride()[-2:], strides, strict=True))
    broadcast = all(
        size == 1 or stride == 0 for size, stride in zip(shown.shape[:-2], shown.stride()[:-2], strict=True)
    )
    return tuple(shown.shape[-2:]) == shape and shown.storage_offset() == 0 and same and broadcast


def _weight_is(name: str, rows_first: bool = False) -> Any:
    # Keywords that a pattern does not name are passed over by the matcher, and addmm's beta and alpha are such.
    return lambda match: not match.output_node().kwargs and _shows(match.kwargs[name], rows_first)


def _packed(node: Node) -> tuple[Any, ...]:
    """The arguments (w4, w2, scale, format, layout, group_size) that fp6::mm shares with fp6::dequantize."""
    dequantize, _ = presented_weight(node)  # type: ignore[misc]
    count("mm")
    return dequantize.args[:6]


def _fp6_mm(x: Tensor, *packed: Any) -> Tensor:
    return fp6.mm(x, *packed)


def _fp6_mm_bias(bias: Tensor, x: Tensor, *packed: Any) -> Tensor:
    return fp6.mm(x, *packed) + bias


@register_graph_pattern(
    CallFunction(aten.mm.default, KeywordArg("x"), KeywordArg("w")), extra_check=_weight_is("w"), pass_dict=_matmuls
)
@register_graph_pattern(
    CallFunction(aten.bmm.default, KeywordArg("x"), KeywordArg("w")), extra_check=_weight_is("w"), pass_dict=_matmuls
)
@register_graph_pattern(
    CallFunction(aten.mv.default, KeywordArg("w"), KeywordArg("x")),
    extra_check=_weight_is("w", rows_first=True),
    pass_dict=_matmuls,
)
def _matmul(match: Match, x: Node, w: Node) -> None:
    match.replace_by_example(_fp6_mm, [x, *_packed(w)])


@register_graph_pattern(
    CallFunction(aten.addmm.default, KeywordArg("bias"), KeywordArg("x"), KeywordArg("w")),
    extra_check=_weight_is("w"),
    pass_dict=_matmuls,
)
def _addmm(match: Match, bias: Node, x: Node, w: Node) -> None:
    match.replace_by_example(_fp6_mm_bias, [bias, x, *_packed(w)])


def _is_row_times_weight(match: Match) -> bool:
    x, w, last, dims = (match.kwargs[name] for name in ("x", "w", "last", "dims"))
    ndim = x.meta["val"].dim()
    return (
        last in (ndim, -1)
        and list(dims) == [ndim - 1]
        and _shows(w, rows_first=False)
        and _sixteen_bits(x, w) is not None
    )


def _sixteen_bits(x: Node, w: Node) -> Node | None:
    """`x` before it was cast to the float32 that the products are taken in, as the weight was."""
    dtype = presented_weight(w)[0].meta["val"].dtype  # type: ignore[index]
    if x.target is prims.convert_element_type.default and x.meta["val"].dtype == torch.float32:
        x = x.args[0]  # type: ignore[assignment]
    return x if x.meta["val"].dtype == dtype else None


# What Inductor makes of a matmul of one row, before any pass, when it tunes by coordinate descent (mode="max-autotune").
@register_graph_pattern(
    CallFunction(
        aten.sum.dim_IntList,
        CallFunction(
            aten.mul.Tensor,
            CallFunction(aten.unsqueeze.default, KeywordArg("x"), KeywordArg("last")),
            KeywordArg("w"),
        ),
        KeywordArg("dims"),
    ),
    extra_check=_is_row_times_weight,
    pass_dict=_matmuls,
)
def _row_times_weight(match: Match, x: Node, w: Node, last: int, dims: Sequence[int]) -> None:
    dtype = match.output_node().meta["val"].dtype

    def rounded(x: Tensor, *packed: Any) -> Tensor:
        return fp6.mm(x, *packed).to(dtype)

    match.replace_by_example(rounded, [_sixteen_bits(x, w), *_packed(w)])


@register_graph_pattern(CallFunction(fp6.dequantize.default, *[Arg() for _ in range(8)]), pass_dict=_leftovers)
def _leftover(match: Match, *args: Any) -> None:
    count("decomposed")
    match.replace_by_example(ops.dequantize, args)


class FP6Pass(CustomGraphPass):
    """Rewrites one graph in place. `before`: the user's own joint-graph passes, which run first, as they would have."""

    def __init__(self, options: str, before: Sequence[Any] = ()) -> None:
        self.options = options
        self.before = tuple(before)

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.before:
            graph_pass(graph)
        _matmuls.apply(graph)
        graph.eliminate_dead_code()
        _leftovers.apply(graph)

    def uuid(self) -> Any | None:
        """Part of Inductor's cache key: all our sources (the key does not cover lowerings and kernels) and the options."""
        theirs = [graph_pass.uuid() if isinstance(graph_pass, CustomGraphPass) else None for graph_pass in self.before]
        if None in theirs:
            return None  # Inductor does not cache graphs that went through a pass it cannot name.
        return source_hash(), self.options, *theirs


def source_hash() -> bytes:
    """A hash of every file of this package."""
    package = Path(__file__).parent
    return get_hash_for_files(tuple(sorted(str(p) for p in package.rglob("*") if p.suffix in _SOURCES)))
