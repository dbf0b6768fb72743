"""The bytes that one run of a graph reads from memory: its inputs.

Of an embedding, the rows that are looked up. What a graph makes on its way is left out: with few tokens it is small and
stays in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from fp6_compile.explanation.result import Traffic
from fp6_compile.packed.tensor import PackedTensor

_LOOKUPS = {"embedding", "index_select", "gather"}


def traffic(graph: Graph, inputs: Sequence[Any], planes: Sequence[Tensor], owned: set[int]) -> Traffic:
    """Of a graph whose inputs are `inputs` and then `planes`; `owned`: ids of the model's parameters and buffers."""
    found = Traffic(packed=sum(plane.nbytes for plane in planes))
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=False):
        if isinstance(value, PackedTensor):
            found.packed += value.packed_bytes
        elif isinstance(value, Tensor) and id(value) in owned:
            found.others += _read(node, value)
        elif isinstance(value, Tensor):
            found.inputs += _read(node, value)
    return found


def _read(node: Node, value: Tensor) -> int:
    """Bytes that the readers of an input read: a lookup as many as it returns."""
    results = [user.meta.get("example_value") for user in node.users if _name(user) in _LOOKUPS]
    if len(results) < len(node.users) or not all(isinstance(result, Tensor) for result in results):
        return value.nbytes if node.users else 0
    return min(value.nbytes, sum(result.nbytes for result in results if isinstance(result, Tensor)))


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
