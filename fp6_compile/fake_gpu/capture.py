"""What Inductor generates for a graph, read instead of loaded: the code, and whether a CUDA graph can record it.

Everything up to the text is the real thing: AOTAutograd, passes, lowerings, scheduler, code generation. In the place of the
step that would load the text stands one that keeps it. Nothing is compiled by Triton or a C++ compiler, timed, cached, run.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from fp6_compile._compat import inductor

# An entry made for a fake device would be served to a real one.
_CONFIG = {"fx_graph_cache": False, inductor.BENCHMARK_FUSION: False}


@dataclass(frozen=True)
class Generated:
    """One module that Inductor generated.

    `obstacle` is why no CUDA graph can record it, in Inductor's words; `partitions` are the operators that Inductor leaves
    out of the recording, and runs between recordings.
    """

    code: str
    obstacle: str | None
    partitions: tuple[str, ...]


class Capture:
    """Compiles graphs as far as their code, and keeps that in `generated`."""

    def __init__(self) -> None:
        self.generated: list[Generated] = []
        self._latest: tuple[str, tuple[str, ...]] | None = None

    def compile(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> None:
        """Generate the code of a graph of Dynamo's; `patches` are settings of torch._inductor.config."""
        inductor.compile_fx(gm, inputs, inner_compile=self._inner_compile, config_patches=dict(patches))

    def _inner_compile(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **how: Any) -> Any:
        self._latest = None
        with self._instead_of_loading():
            compiled = inductor.compile_fx_inner(gm, example_inputs, **how)
        if self._latest is not None:  # a graph without any computation generates none
            code, partitions = self._latest
            self.generated.append(Generated(code, _obstacle(gm, compiled, how), partitions))
        return compiled

    @contextlib.contextmanager
    def _instead_of_loading(self) -> Iterator[None]:
        capture = self

        def compile_to_module(graph: Any) -> types.SimpleNamespace:
            text, _ = graph.codegen()
            capture._latest = text.value, _partitions(graph)
            return types.SimpleNamespace(call=_cannot_run)

        with (
            mock.patch.object(inductor.GraphLowering, "compile_to_module", compile_to_module),
            mock.patch.object(inductor.output_code, "cudagraph_post_compile", return_value=None),
            mock.patch.object(inductor.output_code, "cudagraph_partition_post_compile", return_value=None),
            mock.patch.object(inductor.AlgorithmSelectorCache, "lookup", _first_wins),
            mock.patch.object(inductor.AlgorithmSelectorCache, "make_precompile_fn", return_value=dict),
            inductor.config.patch(_CONFIG),
        ):
            yield


def _cannot_run(*_: Any) -> Any:
    raise RuntimeError("fp6: this code was generated to be read, not to be run")


def _first_wins(_: Any, choices: Sequence[Any], *args: Any, **how: Any) -> dict[Any, float]:
    """Autotuning without a device: of several choices the first is taken, nothing is timed."""
    return {choice: float(rank) for rank, choice in enumerate(choices)}


def _obstacle(gm: torch.fx.GraphModule, compiled: Any, how: dict[str, Any]) -> str | None:
    reason: str | None = compiled.disabled_cudagraphs_reason
    if reason is None and compiled.cudagraph_info is not None:
        reason = ", ".join(compiled.cudagraph_info.cudagraph_fail_reasons) or None
    if reason is None:
        mutated = compiled.mutated_inputs, compiled.mutated_input_idxs
        static = how.get("static_input_idxs") or ()
        reason = inductor.check_for_mutation_ignore_cuda_graph_managed_tensor(gm, *mutated, static)
    return reason


def _partitions(graph: Any) -> tuple[str, ...]:
    """Operators that Inductor's scheduler leaves out of CUDA graphs, with its reasons."""
    if not inductor.config.graph_partition:
        return ()
    should: Callable[[Any], str | None] = graph.scheduler.should_partition
    found = []
    for node in graph.scheduler.nodes:
        if (reason := should(node)) is not None:
            origin = node.node.get_origin_node() if node.node is not None else None
            found.append(f"{origin.target if origin is not None else node.get_name()}: {reason}")
    return tuple(found)
