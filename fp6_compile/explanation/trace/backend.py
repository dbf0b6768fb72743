"""A backend for torch.compile that notes graphs, linears and kernels, and runs none of them.

Dynamo, the search for linears, AOTAutograd, the graph pass and Inductor's code generation are the real ones. They work on
fakes (fakes.py), and weights are packed in shape only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fp6_compile import lowerings
from fp6_compile.backend.compile import inductor_patches
from fp6_compile.backend.find.merging import Candidate
from fp6_compile.backend.graph import PackedGraph
from fp6_compile.backend.planes import Planes, PlanesKey, Stamp
from fp6_compile.config import Options
from fp6_compile.explanation.result import Traffic
from fp6_compile.explanation.trace.fakes import Fakes
from fp6_compile.explanation.trace.launches import launches
from fp6_compile.explanation.trace.traffic import traffic
from fp6_compile.fake_gpu.capture import generate
from fp6_compile.formats import AUTO, Format, get_format
from fp6_compile.layouts.packing import pack
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import LinearReport


@dataclass
class Step:
    """What the graphs of one call do, added up. A graph that runs for several layers counts as often as it runs."""

    graphs: int = 0
    launches: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    partitions: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True)
class Found:
    """A weight that a matmul reads: its names in the model, its line of the report, its format, and its SQNR in dB."""

    names: tuple[str, ...]
    line: LinearReport
    format: str | None
    sqnr: float | None


class Trace:
    """A backend for torch.compile that notes what the backend fp6 would do. Its graphs compute fakes.

    `found` has each weight once, in the order in which they run. `ask` answers questions about values (values.py).
    """

    def __init__(
        self, fakes: Fakes, model: nn.Module, options: Options, ask: Callable[..., Any], unknown: str | None = None
    ) -> None:
        self.options = options
        self.unknown = unknown  # why no code can be generated
        self.found: dict[int, Found] = {}
        self.step = Step()
        self._fakes = fakes
        self._ask = ask
        patches = inductor_patches(options, fakes.device.type == "cuda")
        self.asks_for_cuda_graphs = bool(patches.get("triton.cudagraphs"))
        self._patches = {**patches, "triton.cudagraphs": True}
        self._names: dict[int, list[str]] = {}
        for name, tensor in _tensors(model):
            self._names.setdefault(id(tensor), []).append(name)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Note what would be generated for a graph of Dynamo's. What is returned computes fakes, and notes its calls."""
        packed = _ShapedGraph(gm, example_inputs, self.options, self._fakes, self._ask)
        inputs = packed.inputs()
        kept = [example_inputs[position] for position in packed.kept]
        read = traffic(packed.gm.graph, kept, packed.planes(), set(self._names))
        generated = self._generate(packed, inputs)

        def run(*args: Any) -> Any:
            self._add(generated, read)
            for position, line in sorted(packed.lines.items()):
                self._find(args[position], line, packed)
            return gm(*args)

        return run

    def _generate(self, packed: PackedGraph, inputs: Sequence[Any]) -> Step:
        if self.unknown is not None:
            return Step()
        lowerings.register()
        try:
            with torch.no_grad():  # a backward pass asks for a device even to be traced
                modules = generate(packed.gm, inputs, self._patches)
        except Exception as error:  # whatever Inductor cannot do without the device; the rest of the result still holds
            return Step(failures=[f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"])
        step = Step()
        for module in modules:
            step.launches += launches(module.code)
            step.obstacles += [module.obstacle] if module.obstacle else []
            step.partitions += module.partitions
        return step

    def _add(self, graph: Step, read: Traffic) -> None:
        for name in ("launches", "obstacles", "partitions", "failures"):
            getattr(self.step, name).extend(getattr(graph, name))
        self.step.graphs += 1
        self.step.traffic += read

    def _find(self, value: Tensor, line: LinearReport, packed: _ShapedGraph) -> None:
        if id(value) in self.found:
            return
        names = tuple(self._names.get(id(value), [line.name]))
        key = packed.keys.get(line.name)
        if isinstance(value, PackedTensor):
            self.found[id(value)] = Found(names, line, value.spec.format, None)
        elif not line.quantized or key is None:
            self.found[id(value)] = Found(names, line, None, None)
        else:
            self.found[id(value)] = Found(names, line, key.spec.format, packed.error_of(value, key))


class _ShapedGraph(PackedGraph):
    """A graph whose weights are packed in shape only. What depends on their values is asked of who has them.

    As in a real compilation, a weight with NaN or infinite values is not packed.
    """

    def __init__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        fakes: Fakes,
        ask: Callable[..., Any],
    ) -> None:
        self.keys: dict[str, PlanesKey] = {}
        self._fakes = fakes
        self._ask = ask
        self._errors: dict[int, float | None] = {}
        super().__init__(gm, example_inputs, options)

    def error_of(self, fake: Tensor, planes_key: PlanesKey) -> float | None:
        """The SQNR of a weight in dB; None where its values are not known."""
        if id(fake) not in self._errors:
            key = self._fakes.key(fake)
            self._errors[id(fake)] = None if key is None else self._ask("sqnr", key, planes_key)
        return self._errors[id(fake)]

    def _format(self, group: list[Candidate], transposed: bool) -> Format:
        """As format="auto" chooses it; where the weights' values are not known, the first that it would try."""
        if group[0].packed or self.options.format != "auto":
            return super()._format(group, transposed)
        keys = [self._fakes.key(candidate.value) for candidate in group]
        how = transposed, self.options.group_size, self.options.scale_method
        return get_format((None if None in keys else self._ask("best_format", keys, *how)) or AUTO[0])

    def _planes_of(self, group: list[Candidate], key: PlanesKey) -> Planes:
        for candidate in group:
            self.keys[candidate.names[0]] = key
            try:
                self.error_of(candidate.value, key)
            except ValueError as error:
                raise ValueError(f"fp6: cannot quantize {candidate.names[0]}: {error}") from error
        return _Shapes([candidate.value for candidate in group], key, [candidate.names[0] for candidate in group])


class _Shapes(Planes):
    """Planes of parameters that have no values."""

    def _quantized(self, parameter: Any, name: str) -> tuple[Stamp, tuple[Tensor, ...]]:
        if isinstance(parameter, PackedTensor):
            return super()._quantized(parameter, name)
        spec = self.key.spec
        n, k = parameter.shape[::-1] if spec.transposed else parameter.shape
        codes = parameter.new_empty(n, k, dtype=torch.uint8)
        groups = -(-k // spec.group_size) if spec.group_size else 1
        scale = parameter.new_empty(groups, n, dtype=torch.float32)
        return Stamp(id(parameter), 0, 0, 0, None), (
            *pack(codes, get_format(spec.format), spec.layout),
            scale,
        )

    def _adopt(self, parameters: Sequence[Any], sources: Sequence[tuple[Tensor, ...]]) -> None:
        """Nothing to do: fakes have no memory."""


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
