"""Weights that a matmul reads where linears.py does not look: inside of a function (bilinear, an LSTM, attention), or
computed from parameters on the way (`weight * mask`, `a @ b`, weight_norm). None is quantized; all are reported.

What a function does with its arguments is not looked up in a list: it is run, on the tensors without values that Dynamo has
for it, and its operators are watched. What is computed from parameters alone is a weight as they are; what is computed from
anything else is not.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg
from torch.utils._pytree import tree_leaves, tree_map

from fp6_compile._compat.torch import TorchDispatchMode, enable_python_dispatcher
from fp6_compile.backend.find.linears import Weight, function_name

# Operators that multiply matrices, by the ends and middles of their names. Convolutions are none.
_MATMUL = re.compile(r"(mm|mv|dot|linear)_?$|mm_activation|matmul|attention|encoder_layer|rnn|lstm|gru|einsum")
# Those that only add their first argument, and those that only add what comes after the third.
_ADDS_FIRST = re.compile(r"^_?(addmm|addmv|addbmm|baddbmm)")
_ADDS_LAST = re.compile(r"scaled_dot_product|_attention_forward")


def hidden_weights(gm: GraphModule, model: Mapping[Node, Tensor], known: Collection[Node]) -> dict[Node, Weight]:
    """Parameters that a matmul reads in such a way.

    `model` are the inputs that are part of the model, and `known` those that have been found to be weights already.
    """
    # What is made of the model alone, and of which parameters of two dimensions or more.
    made_of: dict[Node, set[Node]] = {}
    found: dict[Node, Weight] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if node in model or not _leaves(node.meta.get("example_value")):
                value = model.get(node)
                made_of[node] = {node} if isinstance(value, torch.nn.Parameter) and value.dim() > 1 else set()
        elif node.op != "output":
            read = set().union(*(made_of.get(i, set()) for i in node.all_input_nodes))
            if all(i in made_of for i in node.all_input_nodes) or not _leaves(node.meta.get("example_value")):
                made_of[node] = read
            for parameter in _multiplied(gm, node, made_of) if read - set(known) else ():
                if parameter not in known:
                    weight = found.setdefault(parameter, Weight(parameter))
                    weight.matmuls.append(node)
                    ways = [user for user in parameter.users if user is node or parameter in made_of.get(user, ())]
                    weight.others = list(dict.fromkeys([*weight.others, *map(function_name, ways)]))
    return found


def _multiplied(gm: GraphModule, node: Node, made_of: Mapping[Node, set[Node]]) -> set[Node]:
    """The parameters that are, by way of `made_of`, operands of a matmul in `node`."""
    if node.op == "get_attr":
        return set()
    watch = _Watch()

    def value_of(argument: Node) -> Any:
        if argument.op == "get_attr":
            return getattr(gm, str(argument.target))
        # A copy, for the function may write; and its own, whoever else reads the tensor.
        value = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, argument.meta["example_value"])
        if argument in made_of and not (function_name(node) == "linear" and node.args[:1] == (argument,)):
            watch.made_of |= {id(tensor): made_of[argument] for tensor in _leaves(value)}
        return value

    values = {argument: value_of(argument) for argument in node.all_input_nodes}
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    function = node.target
    if node.op == "call_method":
        function, args = getattr(args[0], str(node.target)), args[1:]
    try:
        with torch.no_grad(), _fake_mode_of(values), watch:
            function(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # torch.cond, for one, cannot be watched: all that such a function reads is named
        return set().union(*watch.made_of.values())
    return watch.multiplied


@contextlib.contextmanager
def _fake_mode_of(values: Any) -> Iterator[None]:
    """Dynamo's fake mode; its symbolic sizes get no guards in this context, and no new symbols."""
    modes = (getattr(tensor, "fake_mode", None) for tensor in _leaves(list(values.values())))
    fake_mode = next((mode for mode in modes if mode is not None), None)
    with contextlib.ExitStack() as stack:
        if fake_mode is not None:
            stack.enter_context(fake_mode)
            stack.enter_context(enable_python_dispatcher())  # whose operators take symbolic sizes
            if (shapes := fake_mode.shape_env) is not None:
                stack.enter_context(shapes.suppress_guards())
                stack.enter_context(shapes.ignore_fresh_unbacked_symbols())
        yield


class _Watch(TorchDispatchMode):
    """Sees which of the tensors that are made of parameters an operator multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.made_of: dict[int, set[Node]] = {}
        self.multiplied: set[Node] = set()
        self._alive: list[Any] = []  # so that no tensor gets the id of another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = func.name().split("::")[1].split(".")[0], _leaves((args, kwargs))
        if _MATMUL.search(name):
            operands = args[1:] if _ADDS_FIRST.search(name) else args
            operands = operands[:3] if _ADDS_LAST.search(name) else (operands, kwargs)
            self.multiplied |= self._parameters(_leaves(operands))
        out = func(*args, **(kwargs or {}))
        if tensors and all(id(tensor) in self.made_of for tensor in tensors):
            self.made_of |= {id(tensor): self._parameters(tensors) for tensor in _leaves(out)}
        self._alive.append((args, kwargs, out))
        return out

    def _parameters(self, tensors: list[Tensor]) -> set[Node]:
        return set().union(*(self.made_of.get(id(tensor), set()) for tensor in tensors))


def _leaves(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
