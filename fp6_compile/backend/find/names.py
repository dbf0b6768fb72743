"""What modules and parameters are called: as the model that was compiled calls them, whatever Dynamo calls that model.

Dynamo knows a weight by the expression that leads to it from the function being traced: `L['self']._modules['fc']...`, or
`L['args'][0]._modules['fc']...` where a decorator stands around `forward`, or `L['self']._parameters['weight']` of an inner
module after a graph break. So a name is looked up instead: by identity, among the parameters of the model it belongs to.
That is the largest module that is being called, from torch.compile's wrapper on the call stack down to Dynamo, or that the
expression leads through, and that has the weight. Where several models are in one graph, each name begins with
the variable that holds its model. Where there is no module, the expression is the name.
"""

from __future__ import annotations

import logging
import re
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp6_compile._compat.dynamo import CONVERT_FRAME, EVAL_FRAME, source_name
from fp6_compile.config import names_in, warn_of_unmatched

log = logging.getLogger("fp6_compile")
# By model: the globs of `skip` that were warned about.
_warned: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()


class Names:
    """The names that one graph of Dynamo's has for its weights. To be made while Dynamo compiles it."""

    def __init__(self, gm: GraphModule) -> None:
        self._called, self._scope = _call_stack()
        self._known: dict[int, tuple[torch.nn.Module, str]] = {}
        self._texts: list[str] = []
        self._roots: dict[int, tuple[torch.nn.Module, str]] = {}
        for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            self._texts.append(_path(_source(node)) or node.name)
            if _is_matrix(node) and (root := self._root(node)) is not None:
                self._roots[position] = root
        self._several = len({id(model) for model, _ in self._roots.values()}) > 1
        self._models: list[torch.nn.Module] = []
        self._of_modules: dict[int, str] = {}
        self._owners: dict[int, list[tuple[torch.nn.Module, str, str]]] = {}
        for model in (*(model for model, _ in self._roots.values()), *self._called):
            if id(model) not in self._of_modules:  # else a part of one before
                self._add(model)

    def _add(self, model: torch.nn.Module) -> None:
        self._models.append(model)
        for name, module in model.named_modules(remove_duplicate=False):
            self._of_modules.setdefault(id(module), name)
            for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._owners.setdefault(id(parameter), []).append((module, name, attribute))

    def modules(self, value: Any) -> list[tuple[torch.nn.Module, str]]:
        """The modules that have the parameter `value`, with their fully qualified names in their model."""
        return [(module, name) for module, name, _ in self._owners.get(id(value), ())]

    def of(self, position: int, value: Any, matmuls: Iterable[Node] = ()) -> list[str]:
        """The names that a `skip` glob is matched with, the one to report first, of the graph's input at `position`.

        That is the parameter's own name; of a tied one's, that of a module among those that run `matmuls`.
        """
        known = [f"{name}.{attribute}" if name else attribute for _, name, attribute in self._owners.get(id(value), ())]
        known = known or [self._texts[position]]
        owners = [name.removesuffix(".weight") for name in known]
        readers = [name for name in map(self._module, matmuls) if name and any(n.endswith(".weight") for n in known)]
        first = [name for name in readers if name in owners or id(value) not in self._owners]
        names = list(dict.fromkeys([*first, *owners, *readers]))
        if self._several and position in self._roots:
            names.insert(0, f"{self._roots[position][1]}.{names[0]}".strip("."))
        return names

    def check(self, skip: Sequence[str]) -> None:
        """Warn of the globs of `skip` that match no module of the models in this graph: once for each model."""
        said = set(skip).intersection(*(_warned.get(model, set()) for model in self._models))
        fresh = [glob for glob in skip if self._models and glob not in said]
        names = [name for model in self._models for name in names_in(model)]
        names += [f"{text}.{name}" for model, text in {*self._roots.values()} for name in names_in(model)]
        classes = dict.fromkeys(type(model).__name__ for model in self._models)
        missed = warn_of_unmatched(fresh, names, ", ".join(classes))
        for model in self._models:
            _warned.setdefault(model, set()).update(missed)

    def _root(self, node: Node) -> tuple[torch.nn.Module, str] | None:
        """The model that an input belongs to, and the expression for it; None for one that no module has."""
        source, expressions = getattr(node.meta.get("grapharg"), "source", None), []
        while source is not None:
            expressions.append(source_name(source))
            source = getattr(source, "base", None)
        for expression in reversed(expressions):
            found = self._evaluated(expression)
            if isinstance(found, torch.nn.Module):
                return self._outermost(found, _path(expression, keep_variable=True))
        return None

    def _outermost(self, module: torch.nn.Module, expression: str) -> tuple[torch.nn.Module, str]:
        if id(module) not in self._known:
            holders = (m for m in self._called if m is not module and any(part is module for part in m.modules()))
            largest = next(holders, None)
            known = (module, expression) if largest is None else (largest, type(largest).__name__)
            self._known[id(module)] = known
        return self._known[id(module)]

    def _evaluated(self, expression: str) -> Any:
        try:
            return eval(expression, dict(self._scope))
        except Exception:  # it may be written in terms of Dynamo's own functions, or lead through what is gone by now
            return None

    def _module(self, matmul: Node) -> str:
        """The name of the module whose forward runs `matmul`."""
        stack = list((matmul.meta.get("nn_module_stack") or {}).items())
        if not stack:
            return ""
        key, (path, _) = stack[-1]
        identity = key.split("@")[0]  # its second call has the key "identity@1"
        known = self._of_modules.get(int(identity)) if identity.isdigit() else None
        return _path(path) if known is None else known


def _call_stack() -> tuple[list[torch.nn.Module], Mapping[str, Any]]:
    """The modules being called from torch.compile's wrapper down to Dynamo, the largest first; Dynamo's names L and G.

    A frame's modules are its variables, and the global ones that its code names.
    """
    frame: Any = sys._getframe()
    traced, values = None, list[Any]()
    while frame is not None and (module := frame.f_globals.get("__name__")) != EVAL_FRAME:
        if module == CONVERT_FRAME:  # what is above it are Dynamo and this backend
            traced, values = frame.f_locals.get("frame", traced), []
        elif traced is not None:
            values += _variables(frame)
        frame = frame.f_back
    if traced is None:  # no torch.compile: the graph was made in another way
        return [], {}
    values = [*(values if frame is not None else []), *_variables(traced)]
    modules = {id(value): value for value in values if issubclass(type(value), torch.nn.Module)}
    sizes = {key: sum(1 for _ in module.modules()) for key, module in modules.items()}
    scope = {"L": traced.f_locals, "G": traced.f_globals}
    return [modules[key] for key in sorted(sizes, key=sizes.__getitem__, reverse=True)], scope


def _variables(frame: Any) -> list[Any]:
    return [*frame.f_locals.values(), *(frame.f_globals.get(name) for name in frame.f_code.co_names)]


def _is_matrix(placeholder: Node) -> bool:
    value = placeholder.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() > 1


def _source(placeholder: Node) -> str:
    """Where Dynamo found the input, as Python text: `L['self']._modules['fc']._parameters['weight']`."""
    return source_name(getattr(placeholder.meta.get("grapharg"), "source", None))


def _path(source: str, keep_variable: bool = False) -> str:
    """`model.layers.0.fc.weight` from a source's or a module stack's text."""
    inner = re.sub(r"^[LG]\['(\w+)'\]", r".\1" if keep_variable else "", source)
    inner = inner.replace(".__dict__['_modules']", "._modules")
    inner = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", inner)
    return re.sub(r"\[(?:'([^']+)'|(\d+))\]", lambda m: "." + (m[1] or m[2]), inner).strip(".")
