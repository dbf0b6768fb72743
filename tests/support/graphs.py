"""Compilation that stops before code generation, and its graphs as short text."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.utils._dtype_abbrs import dtype_abbrs

from fp6_compile.backend import compile as backend
from fp6_compile.backend import passes


def show(graph: Graph) -> str:
    """One line per node, with dtype and shape, and names that do not depend on the torch version."""
    names: dict[Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            results = [names.get(arg, "None") for arg in torch.utils._pytree.tree_leaves(node.args)]
            lines.append(f"return {', '.join(results)}")
            continue
        label = "in" if node.op == "placeholder" else getattr(node.target, "__name__", "constant").split(".")[0]
        names[node] = f"{label}{sum(name.startswith(label) for name in names.values())}"
        args = ", ".join(_argument(arg, names) for arg in (*node.args, *node.kwargs.values()))
        call = "" if node.op == "placeholder" else f" = {str(node.target).removesuffix('.default')}({args})"
        lines.append(f"{names[node]}: {_kind(node.meta['val'])}{call}")
    return "\n".join(lines) + "\n"


def _argument(arg: object, names: dict[Node, str]) -> str:
    if isinstance(arg, list) and any(isinstance(item, Node) for item in arg):
        return f"[{', '.join(_argument(item, names) for item in arg)}]"
    return names[arg] if isinstance(arg, Node) else str(arg)


def _kind(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{dtype_abbrs[value.dtype]}[{', '.join(map(str, value.shape))}]"


class Captured:
    """The graphs that went through the pass: text before and after, graph after, inputs that CUDA graphs need not copy."""

    def __init__(self) -> None:
        self.before: list[str] = []
        self.after: list[str] = []
        self.graphs: list[Graph] = []
        self.static_inputs: list[list[int]] = []

    def targets(self, position: int = -1) -> list[str]:
        """The operators of a graph after the pass, views left out."""
        views = ("permute", "view", "reshape", "unsqueeze", "squeeze", "expand", "_unsafe_view")
        calls = [str(node.target) for node in self.graphs[position].nodes if node.op == "call_function"]
        return [call.removesuffix(".default") for call in calls if not any(f".{view}" in call for view in views)]

    def matmuls(self) -> int:
        """How often the last graph calls fp6::mm."""
        return self.targets().count("fp6.mm")


@contextlib.contextmanager
def without_codegen() -> Iterator[Captured]:
    """Everything up to the pass is real; the graph after it is interpreted instead of compiled, which saves minutes."""
    captured = Captured()
    original = passes.FP6Pass.__call__

    def spy(self: passes.FP6Pass, graph: Graph) -> None:
        captured.before.append(show(graph))
        original(self, graph)
        captured.after.append(show(graph))
        captured.graphs.append(graph)

    def interpret(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        captured.static_inputs.append(list(kwargs["static_input_idxs"]))
        return make_boxed_func(gm.forward)

    with (
        mock.patch.object(passes.FP6Pass, "__call__", spy),
        mock.patch.object(backend, "compile_fx", functools.partial(compile_fx, inner_compile=interpret)),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield captured


@contextlib.contextmanager
def explaining_here() -> Iterator[None]:
    """Inside, `explain` works in this process, without starting one: for tests of what it says. Its imports cost seconds."""
    from fp6_compile.explanation import process
    from fp6_compile.explanation.trace import worker

    def explained(request: Any, answer: Callable[..., Any]) -> Any:
        def ask(*question: Any) -> Any:
            with unset_fake_temporarily():
                return answer(*question)

        return worker.explained(request, ask)

    with mock.patch.object(process, "explained", explained):
        yield
