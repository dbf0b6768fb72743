"""Dynamo's graph with packed weights: a copy in which `fp6::dequantize` stands in the place of each quantized weight.

    before   linear = F.linear(x, weight, bias)
    after    dequantize = fp6.dequantize(planes, scale, ...);  linear = F.linear(x, dequantize, bias)

    before   q = F.linear(x, wq);  k = F.linear(x, wk)
    after    w = fp6.dequantize(planes, scale, ...);  q = F.linear(x, w[:n]);  k = F.linear(x, w[n:])

planes and scale are new inputs of the graph, behind all others, marked as static: AOTAutograd and Inductor can then cache
the graph, CUDA graphs need not copy them, and their contents can change. A weight that nothing else reads is an input no
more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp6_compile._compat.torch import TracingContext
from fp6_compile.backend.find.fused import copied, unfused
from fp6_compile.backend.find.hidden import hidden_weights
from fp6_compile.backend.find.linears import Weight, find_weight, is_linear, skip_reason
from fp6_compile.backend.find.merging import Candidate, groups
from fp6_compile.backend.find.names import Names
from fp6_compile.backend.planes import Planes, PlanesKey
from fp6_compile.backend.weights import WeightInputs, packed_planes
from fp6_compile.config import Options, SkipReason
from fp6_compile.formats import AUTO, Format, get_format
from fp6_compile.layouts.packing import layout_for, plane_names
from fp6_compile.layouts.spec import PackingSpec
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.quantize import choose_format
from fp6_compile.report import LinearReport, count


class PackedGraph:
    """The rewritten graph `gm` of a Dynamo graph, and how its inputs follow from those that Dynamo passes.

    `kept` are the positions of Dynamo's inputs that it still has, `weights` the sets of bit planes that come after them, and
    `lines` the lines of the report by position. Raises ValueError, with `strict`, for a linear that cannot be quantized.
    """

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.options = options
        self.example_inputs = example_inputs
        self.names = Names(gm)
        self.names.check(options.skip)
        gm = unfused(gm)
        self.gm, self._copies = copied(gm)
        self.kept = list(range(len(example_inputs)))
        self.weights = WeightInputs()
        self._planes: list[Planes] = []
        self.lines: dict[int, LinearReport] = {}
        for group in groups(self._candidates(gm)):
            self._quantize(group)
        self.gm.graph.lint()
        self.gm.recompile()

    @property
    def linears(self) -> list[LinearReport]:
        """The lines of the report, in order."""
        return [self.lines[position] for position in sorted(self.lines)]

    def planes(self) -> list[Tensor]:
        """The bit planes and scales of all quantized weights: the last inputs of the new graph."""
        return [tensor for planes in self._planes for tensor in planes.packing.tensors]

    def inputs(self) -> list[Any]:
        """Example inputs of the new graph. Packed ones are fake already: AOTAutograd would give their sizes symbols."""
        tracing = TracingContext.try_get()
        planes = self.planes()
        if tracing is not None and tracing.fake_mode is not None:
            planes = [tracing.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in planes]
        return [self.example_inputs[position] for position in self.kept] + planes

    def _candidates(self, gm: GraphModule) -> Iterator[Candidate]:
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), self.example_inputs, strict=True))
        weights = _weights(gm, inputs)
        for position, (node, value) in enumerate(inputs.items()):
            packed = getattr(value, "_local_tensor", value)  # a DTensor's
            weight = weights.get(node)
            if isinstance(packed, PackedTensor):
                name = self.names.of(position, value, weight.matmuls if weight else ())[0]
                self.lines[position] = _packed_already(name, packed)
            if weight is None or not (_is_static(node, value) or is_linear(weight)):
                continue
            candidate = Candidate(position, weight, value, self.names.of(position, value, weight.matmuls))
            if isinstance(packed, PackedTensor):
                if packed is value and not packed.is_lent and _can_move(candidate):
                    yield candidate
            elif reason := skip_reason(weight, value, candidate.names, self.names.modules(value), self.options):
                self._skip(candidate, reason)
            else:
                yield candidate

    def _skip(self, candidate: Candidate, reason: SkipReason) -> None:
        if self.options.strict and not reason.by_request:
            raise ValueError(f"fp6: strict: cannot quantize {candidate.names[0]}: {reason.text}")
        count("linears_skipped")
        self._report(candidate, candidate.value.nbytes, reason=reason.text)

    def _report(self, candidate: Candidate, size: int, **reason_or_note: str | None) -> None:
        value = candidate.value
        shape = tuple(value.shape[::-1]) if candidate.orientations == [True] else tuple(value.shape)
        line = LinearReport(candidate.names[0], shape, value.dtype, value.nbytes, size, **reason_or_note)
        self.lines[candidate.position] = line

    def _quantize(self, group: list[Candidate]) -> None:
        """Pack a group of weights side by side, and put `fp6::dequantize` before every linear that reads them."""
        try:
            packs = [self._pack(group, transposed) for transposed in group[0].orientations]
        except ValueError as error:  # one of the weights has values that cannot be quantized
            for candidate in group if len(group) > 1 else ():
                self._quantize([candidate])
            if len(group) == 1:
                self._skip(group[0], SkipReason(str(error), False))
            return
        for planes in packs:
            self._replace(group, planes)
            self.weights.add([candidate.position for candidate in group], planes)
            self._planes.append(planes)
        for i, candidate in enumerate(group):
            self._drop(candidate)
            if not candidate.packed:
                count("linears_quantized")
            size = sum(tensor.nbytes for planes in packs for tensor in planes.packing.rows[i])
            self._report(candidate, size, note=_note(candidate, group), format=packs[0].key.spec.format)

    def _pack(self, group: list[Candidate], transposed: bool) -> Planes:
        first = group[0]
        how, value = first.packed or self.options, first.value
        fmt = self._format(group, transposed)
        layout = first.packed.layout if first.packed else layout_for(value.device, value.dtype, fmt)
        k = value.shape[0 if transposed else 1]
        spec = PackingSpec(fmt.name, layout, how.group_size, k, value.dtype, transposed)
        return self._planes_of(group, PlanesKey(spec, self.options.scale_method, value.device))

    def _planes_of(self, group: list[Candidate], key: PlanesKey) -> Planes:
        return packed_planes([c.value for c in group], key, [c.names[0] for c in group])

    def _format(self, group: list[Candidate], transposed: bool) -> Format:
        options, packed = self.options, group[0].packed
        if packed or options.format != "auto":
            return get_format(packed.format if packed else options.format)
        weights = [c.value.detach().t() if transposed else c.value.detach() for c in group]
        return choose_format(weights, [get_format(name) for name in AUTO], options.group_size, options.scale_method)

    def _replace(self, group: list[Candidate], planes: Planes) -> None:
        """Each weight's readers read its rows of the dequantized bit planes instead."""
        spec = planes.key.spec
        transposed, last, first = spec.transposed, self._dequantize(group[0], spec), 0
        whole = last
        for candidate in group:
            new = whole
            if len(group) > 1:
                with self.gm.graph.inserting_after(last):
                    new = last = self.gm.graph.call_function(torch.narrow, (whole, 0, first, candidate.rows))
                first += candidate.rows
            if transposed:
                with self.gm.graph.inserting_after(last):
                    new = last = self.gm.graph.call_function(torch.t, (new,))
            for user in candidate.weight.users[transposed]:
                self._copies[user].replace_input_with(self._copies[candidate.weight.placeholder], new)

    def _dequantize(self, candidate: Candidate, spec: PackingSpec) -> Node:
        graph = self.gm.graph
        name = self._copies[candidate.weight.placeholder].name
        last = graph.find_nodes(op="placeholder")[-1]
        planes: list[Node] = []
        for plane in (*plane_names(get_format(spec.format)), "scale"):
            with graph.inserting_after(planes[-1] if planes else last):
                planes.append(graph.placeholder(f"{name}{'t_' if spec.transposed else ''}{plane}"))
            planes[-1]._dynamo_source = None
            planes[-1].meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        with graph.inserting_after(planes[-1]):
            how = (spec.format, spec.layout, spec.group_size, spec.k, spec.dtype)
            return graph.call_function(torch.ops.fp6.dequantize.default, (planes[:-1], planes[-1], *how))

    def _drop(self, candidate: Candidate) -> None:
        """A weight that nothing reads any more is no input any more."""
        old = self._copies[candidate.weight.placeholder]
        if not old.users:
            self.gm.graph.erase_node(old)
            self.kept.remove(candidate.position)


def _note(candidate: Candidate, group: list[Candidate]) -> str | None:
    others, readers = [c.names[0] for c in group if c is not candidate], candidate.weight.others
    notes = ["packed already"] if candidate.packed else []
    notes += [f"merged with {', '.join(others)}"] if others else []
    notes += [f"{candidate.value.dtype} kept for {', '.join(readers)}"] if readers else []
    return "; ".join(notes) or None


def _can_move(candidate: Candidate) -> bool:
    """Whether a PackedTensor's bit planes can lie beside others'. Changes of inference tensors could not be noticed."""
    weight, value, packed = candidate.weight, candidate.value, candidate.packed
    as_linear = candidate.orientations == [False] and packed is not None and not packed.transposed
    return as_linear and weight.mutated_by is None and not value.is_inference()


def _packed_already(name: str, weight: PackedTensor) -> LinearReport:
    """The line of a weight that quantize_ or load has packed: the graph multiplies by it through fp6::mm by itself."""
    how = {"note": "packed already", "format": weight.spec.format}
    return LinearReport(name, tuple(weight.shape), weight.dtype, weight.nbytes, weight.packed_bytes, **how)


def _weights(gm: GraphModule, inputs: Mapping[Node, Any]) -> dict[Node, Weight]:
    found = {node: weight for node in inputs if (weight := find_weight(node)) is not None}
    model = {node: value for node, value in inputs.items() if _is_of_model(node, value)}
    return {**found, **hidden_weights(gm, model, found)}


def _is_of_model(node: Node, value: Any) -> bool:
    """Whether an input is part of the model rather than of the call."""
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return isinstance(value, torch.nn.Parameter) or (isinstance(value, Tensor) and static is not None)


def _is_static(node: Node, value: Any) -> bool:
    """Whether an input is part of the model, and can be a weight: a KV cache is static, and none."""
    if isinstance(value, torch.nn.Parameter):
        return value.dim() > 1
    return _is_of_model(node, value) and value.dim() == 2
