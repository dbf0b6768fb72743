"""The torch.compile backend `fp6`: Dynamo's graph in, a compiled function out. Wiring only.

    Dynamo graph --+-- linears.py   which inputs are weights of linears
                   +-- weights.py   their planes, packed once, kept fresh
                   v
    the graph with three inputs (w4, w2, scale) and a fp6::dequantize in the place of each such weight
                   v
    compile_fx, with passes.py in the joint graph and lowerings/ behind fp6::mm

The packed tensors are *inputs* of the graph, marked static, rather than buffers or constants: AOTAutograd and Inductor can
then cache the graph, CUDA graphs need not copy them, and their contents can change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch.fx import Graph, GraphModule, Node, map_arg

from fp6_compile import lowerings
from fp6_compile.config import Options
from fp6_compile.linears import Weight, find_weight, module_names, refusal
from fp6_compile.packing import layout_for
from fp6_compile.passes import FP6Pass
from fp6_compile.report import LinearReport, Report, count, forget_reports, publish
from fp6_compile.weights import PackSpec, WeightInput, forget_weights, packed_weight


def fp6(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its linears in six bits; `torch.compile(model, backend="fp6")` calls this.

    Args:
        gm, example_inputs: what Dynamo passes to a backend.
        mode: as in torch.compile. With `options`, give it as options={"mode": ...}: torch refuses the two together.
        options: see config.Options.

    Raises:
        ValueError: an option is unknown or ill-typed; with `strict`, a linear cannot be taken.
    """
    parsed = Options.parse(mode, options)
    patches = _inductor_patches(parsed)
    lowerings.register()
    builder = _GraphBuilder(gm, example_inputs, parsed)
    publish(Report(tuple(builder.linears), parsed.format))
    compiled: Any = compile_fx(builder.gm, builder.inputs(), config_patches=patches)
    kept, taken = builder.kept, builder.taken

    def run(*args: Any) -> Any:
        planes = [tensor for weight in taken for tensor in weight.tensors(args[weight.position])]
        return compiled(*[args[position] for position in kept], *planes)

    return run


def _reset() -> None:
    forget_weights()
    forget_reports()


fp6.reset = _reset  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


class _GraphBuilder:
    """A copy of Dynamo's graph (it keeps books on its own) in which packed weights take the place of float ones."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.options = options
        self.example_inputs = example_inputs
        self.gm, self._copies = _copy(gm)
        self.kept = list(range(len(example_inputs)))
        self.taken: list[WeightInput] = []
        self.linears: list[LinearReport] = []
        for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
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
    """Whether an input is part of the model rather than of the call."""
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return isinstance(value, torch.nn.Parameter) or (isinstance(value, Tensor) and static is not None)


def _inductor_patches(options: Options) -> dict[str, Any]:
    """Settings of mode and user, and our pass after the passes that the user has set."""
    try:
        # torch's own wrapper, because it knows the modes, checks names and types, and prepares CUPTI for CUDA graphs.
        settings = torch._TorchCompileInductorWrapper(options.mode, dict(options.inductor), None).config
    except RuntimeError as error:
        raise ValueError(f"fp6: option {'inductor' if options.inductor else 'mode'!r}: {error}") from error
    if settings.get("use_joint_graph_passes") is False:
        raise ValueError(f"fp6: mode={options.mode!r} or use_joint_graph_passes=False turn off the pass that fp6 needs")
    theirs = settings.get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)
    before = theirs if isinstance(theirs, (list, tuple)) else [theirs] if theirs is not None else []
    return {**settings, "joint_custom_pre_pass": FP6Pass(repr(options), before)}
