"""Dynamo's graph with packed weights: a copy in which `fp6::dequantize` stands in the place of each weight that is taken.

    before   linear = F.linear(x, weight, bias)
    after    dequantize = fp6.dequantize(w4, w2, scale, ...);  linear = F.linear(x, dequantize, bias)

w4, w2 and scale are new inputs of the graph, behind all others, marked as static: AOTAutograd and Inductor can then cache
the graph, CUDA graphs need not copy them, and their contents can change. A weight that nothing else reads is an input no
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node, map_arg

from fp6_compile.config import Options
from fp6_compile.linears import Weight, find_weight, module_names, refusal
from fp6_compile.packing import layout_for
from fp6_compile.report import LinearReport, count
from fp6_compile.tensor import PackedTensor
from fp6_compile.weights import PackSpec, WeightInput, packed_weight


class PackedGraph:
    """The rewritten graph `gm` of a Dynamo graph, and how its inputs follow from those that Dynamo passes.

    `kept` are the positions of Dynamo's inputs that it still has, `taken` the weights whose planes come after them, and
    `linears` the lines of the report. Raises ValueError, with `strict`, for a linear that cannot be taken.
    """

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.options = options
        self.example_inputs = example_inputs
        self.gm, self._copies = _copy(gm)
        self.kept = list(range(len(example_inputs)))
        self.taken: list[WeightInput] = []
        self.linears: list[LinearReport] = []
        for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            packed = getattr(example_inputs[position], "_local_tensor", example_inputs[position])  # a DTensor's
            if isinstance(packed, PackedTensor):
                self.linears.append(_packed_already(node, packed))
                continue
            weight = find_weight(node)
            if weight is not None and _is_static(node, example_inputs[position]):
                self._consider(position, weight, example_inputs[position])
        self.gm.graph.lint()
        self.gm.recompile()

    def inputs(self) -> list[Any]:
        """Example inputs of the new graph. Packed ones are fake already: AOTAutograd would give their sizes symbols."""
        tracing = TracingContext.try_get()
        planes = [tensor for weight in self.taken for tensor in weight.packed.tensors]
        if tracing is not None and tracing.fake_mode is not None:
            planes = [tracing.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in planes]
        return [self.example_inputs[position] for position in self.kept] + planes

    def _consider(self, position: int, weight: Weight, value: Tensor) -> None:
        names = module_names(weight)
        refused = refusal(weight, value, names, self.options)
        bytes_after, note = value.nbytes, None
        if refused is None:
            try:
                bytes_after = self._take(position, weight, value, names[0])
                note = f"{value.dtype} kept for {', '.join(weight.others)}" if weight.others else None
            except ValueError as error:
                refused = str(error), False
        reason, excused = refused or (None, True)
        if self.options.strict and not excused:
            raise ValueError(f"fp6: strict: cannot take {names[0]}: {reason}")
        count("linears_refused" if reason else "linears_taken")
        shape = tuple(value.shape[::-1]) if weight.users[True] and not weight.users[False] else tuple(value.shape)
        self.linears.append(LinearReport(names[0], shape, value.dtype, value.nbytes, bytes_after, reason, note))

    def _take(self, position: int, weight: Weight, value: Tensor, name: str) -> int:
        """Put `fp6::dequantize` before every linear that reads the weight; the bytes that they read from now on."""
        layout = layout_for(value.device, value.dtype)
        options, size = self.options, 0
        packs = {}
        for transposed in (t for t, users in weight.users.items() if users):
            spec = PackSpec(options.format, options.group_size, options.scale, layout, transposed, value.device)
            packs[transposed] = packed_weight(value, spec, name)
        old = self._copies[weight.placeholder]
        for transposed, packed in packs.items():
            new = self._dequantize(old, packed.spec, tuple(value.shape), value.dtype)
            for user in weight.users[transposed]:
                self._copies[user].replace_input_with(old, new)
            self.taken.append(WeightInput(position, packed))
            size += sum(tensor.nbytes for tensor in packed.tensors)
        if not old.users:
            self.gm.graph.erase_node(old)
            self.kept.remove(position)
        return size

    def _dequantize(self, old: Node, spec: PackSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Node:
        graph = self.gm.graph
        last = graph.find_nodes(op="placeholder")[-1]
        planes: list[Node] = []
        for name in ("w4", "w2", "scale"):
            with graph.inserting_after(planes[-1] if planes else last):
                planes.append(graph.placeholder(f"{old.name}{'t_' if spec.transposed else ''}{name}"))
            planes[-1]._dynamo_source = None
            planes[-1].meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        k = shape[0] if spec.transposed else shape[1]
        with graph.inserting_after(planes[-1]):
            how = (spec.format, spec.layout, spec.group_size, k, dtype)
            new = graph.call_function(torch.ops.fp6.dequantize.default, (*planes, *how))
        if spec.transposed:
            with graph.inserting_after(new):
                new = graph.call_method("t", (new,))
        return new


def _packed_already(node: Node, weight: PackedTensor) -> LinearReport:
    """The line of a weight that quantize_ or load has packed: the graph multiplies by it through fp6::mm by itself."""
    name, shape = module_names(Weight(node))[0], tuple(weight.shape)
    return LinearReport(name, shape, weight.dtype, weight.nbytes, weight.packed_bytes, note="packed already")


def _copy(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A graph module of its own over copies of `gm`'s nodes, with the attributes that AOTAutograd asks Dynamo's for."""
    copies: dict[Node, Node] = {}
    graph = Graph()
    graph.graph_copy(gm.graph, copies)
    graph.output(map_arg(gm.graph.output_node().args[0], copies.__getitem__))
    for node, twin in copies.items():
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
    new = GraphModule(gm, graph)
    new.meta = gm.meta
    if hasattr(gm, "_param_name_to_source"):
        new._param_name_to_source = gm._param_name_to_source
    return new, copies


def _is_static(node: Node, value: Any) -> bool:
    """Whether an input is part of the model rather than of the call, and can be a weight: a vector is none."""
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return (
        isinstance(value, Tensor) and value.dim() > 1 and (isinstance(value, torch.nn.Parameter) or static is not None)
    )
