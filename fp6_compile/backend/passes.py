"""The graph pass: every matmul whose weight is a dequantized one becomes `fp6::mm`.

    before   permute = aten.permute(fp6.dequantize(planes, scale, ...), [1, 0]);  addmm = aten.addmm(bias, x, permute)
    after    mm = fp6.mm(x, planes, scale, ...);  add = aten.add(mm, bias)

A matmul whose weight is some rows of a dequantized one becomes the same columns of the fp6::mm by all of it, and calls of
fp6::mm with equal arguments become one: that is how the linears that merging.py packs side by side are one launch.

    before   q = aten.mm(x, permute(dequantize[:n]));  k = aten.mm(x, permute(dequantize[n:]))
    after    mm = fp6.mm(x, planes, scale, ...);  q = mm[:, :n];  k = mm[:, n:]

It runs on AOTAutograd's joint graph, before Inductor's own passes touch matmuls. By then linear, matmul, einsum and Conv1D
are mm, addmm, bmm or mv with some chain of views on the weight. The chain is not matched against a list of known ones: it is
replayed on a meta tensor, and its strides tell whether it presents the weight [N, K] as the [K, N] that the matmul wants.

A dequantize that no matmul took is decomposed, so that Inductor fuses it like any pointwise computation.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from fp6_compile import ops
from fp6_compile._compat.inductor import (
    Arg,
    CallFunction,
    CustomGraphPass,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from fp6_compile.backend.views import COPIES, VIEWS, presented_weight, rows_shown
from fp6_compile.lowerings import source_hash
from fp6_compile.report import count

aten, fp6, prims = torch.ops.aten, torch.ops.fp6, torch.ops.prims

_SOURCES = (".py", ".jinja", ".cpp", ".h", ".json")

_matmuls = PatternMatcherPass(pass_name="fp6_mm")
_leftovers = PatternMatcherPass(pass_name="fp6_dequantize")


def _weight_is(name: str, rows_first: bool = False) -> Any:
    def check(match: Match) -> bool:
        # Keywords that a pattern does not name are passed over by the matcher, and addmm's beta and alpha are such. An x of
        # another dtype is the matmul's to refuse.
        w, dtypes = match.kwargs[name], {match.kwargs[key].meta["val"].dtype for key in ("x", name)}
        return not match.output_node().kwargs and rows_shown(w, rows_first) is not None and len(dtypes) == 1

    return check


def _packed(node: Node, rows_first: bool = False) -> tuple[Any, ...]:
    """The rows that `node` shows, and the arguments (*planes, scale, format, layout, group_size) of fp6::mm by all rows."""
    dequantize, _ = presented_weight(node)  # type: ignore[misc]
    count("mm")
    planes, *others = dequantize.args[:5]
    return rows_shown(node, rows_first), *planes, *others  # type: ignore[misc]


def _fp6_mm(x: Tensor, rows: range, *packed: Any) -> Tensor:
    *planes, scale, format, layout, group_size = packed
    out = fp6.mm(x, planes, scale, format, layout, group_size)
    return out if len(rows) == scale.shape[1] else out[..., rows.start : rows.stop]


def _fp6_mm_bias(bias: Tensor, x: Tensor, *packed: Any) -> Tensor:
    return _fp6_mm(x, *packed) + bias


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
    match.replace_by_example(_fp6_mm, [x, *_packed(w, rows_first=match.output_node().target is aten.mv.default)])


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
        and rows_shown(w, rows_first=False) is not None
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
        return _fp6_mm(x, *packed).to(dtype)

    match.replace_by_example(rounded, [_sixteen_bits(x, w), *_packed(w)])


@register_graph_pattern(CallFunction(fp6.dequantize.default, *[Arg() for _ in range(7)]), pass_dict=_leftovers)
def _leftover(match: Match, planes: Sequence[Node], *args: Any) -> None:
    count("decomposed")
    number = len(planes)
    match.replace_by_example(lambda *flat: ops.dequantize(flat[:number], *flat[number:]), [*planes, *args])


def _merge(graph: Graph) -> None:
    """Calls of fp6::mm with equal arguments become one, where the first of them was."""
    first: dict[Any, Node] = {}
    for node in graph.find_nodes(op="call_function", target=fp6.mm.default):
        known = first.setdefault(tuple(map(_value, node.args)), node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
            count("merged")


def _value(node: Any) -> Any:
    """Equal for equal views of the same tensor, and for equal computations with sizes."""
    if isinstance(node, (list, tuple)):
        return tuple(map(_value, node))
    is_size = isinstance(node, Node) and not isinstance(node.meta.get("val"), Tensor)
    if not isinstance(node, Node) or node.op != "call_function" or not (is_size or node.target in (*VIEWS, *COPIES)):
        return node
    return node.target, *map(_value, tree_leaves(node.args)), *node.kwargs, *map(_value, tree_leaves(node.kwargs))


def _keep_outputs_apart(graph: Graph) -> None:
    """Columns of a merged product that leave the graph are copied: callers count on strides, and keep what they get."""
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        if node.args[0].target is fp6.mm.default and _leaves(node):
            with graph.inserting_after(node):
                copy = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
            copy.meta["val"] = node.meta["val"].clone(memory_format=torch.contiguous_format)
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def _leaves(node: Node) -> bool:
    """Whether `node` or a view of it is an output of the graph."""
    return any(user.op == "output" or (_is_view(user) and _leaves(user)) for user in node.users)


def _is_view(node: Node) -> bool:
    return node.target in (*VIEWS, operator.getitem) or getattr(node.target, "is_view", False)


class FP6Pass(CustomGraphPass):
    """Rewrites a graph in place. `decisions`: what decides on code beside sources. `before`: the user's passes run first."""

    def __init__(self, decisions: str, before: Sequence[Any] = ()) -> None:
        self.decisions = decisions
        self.before = tuple(before)

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.before:
            graph_pass(graph)
        _matmuls.apply(graph)
        _merge(graph)
        graph.eliminate_dead_code()
        _keep_outputs_apart(graph)
        _leftovers.apply(graph)

    def uuid(self) -> Any | None:
        """Part of Inductor's cache key: `decisions`, and our sources and tuned tables, which the key does not cover."""
        theirs = [graph_pass.uuid() if isinstance(graph_pass, CustomGraphPass) else None for graph_pass in self.before]
        if None in theirs:
            return None  # Inductor does not cache graphs that went through a pass it cannot name.
        return source_hash(), self.decisions, *theirs
