"""The bytes that one run of a graph reads from memory: those of its inputs.

Of an embedding only the rows that are looked up count. Intermediate results do not count: with few tokens they are small and
stay in the cache.
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
    """Of a graph with the inputs `inputs` and then `planes`; `owned` are ids of the model's parameters and buffers."""
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
    """Bytes of an input that are read: all, or what lookups return if nothing else reads it."""
    results = [user.meta.get("example_value") for user in node.users if _name(user) in _LOOKUPS]
    if len(results) < len(node.users) or not all(isinstance(result, Tensor) for result in results):
        return value.nbytes if node.users else 0
    return min(value.nbytes, sum(result.nbytes for result in results if isinstance(result, Tensor)))


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
