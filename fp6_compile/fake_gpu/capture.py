"""The code that Inductor generates for a graph, kept as text instead of loaded, and whether a CUDA graph can record it.

Everything up to the text is real: AOTAutograd, passes, lowerings, scheduler, code generation. What is replaced is the step
that would load the text. Triton and the C++ compiler compile nothing, and nothing is timed, cached or run.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from fp6_compile._compat import inductor

# An entry made for a fake device would be served to a real one.
_CONFIG = {"fx_graph_cache": False, inductor.BENCHMARK_FUSION: False}


@dataclass(frozen=True)
class Generated:
    """One module that Inductor generated.

    `partitions` are the operators that Inductor runs outside of CUDA graphs, with its reasons. `obstacle` is why no CUDA
    graph can record the module, in Inductor's words; only `generate` knows it.
    """

    code: str
    partitions: tuple[str, ...]
    obstacle: str | None = None


def generate(gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> list[Generated]:
    """The modules for a graph of Dynamo's; `patches` are settings of torch._inductor.config."""
    found: list[Generated] = []
    inner_compile = functools.partial(_inner_compile, found)
    inductor.compile_fx(gm, inputs, inner_compile=inner_compile, config_patches=dict(patches))
    return found


def _inner_compile(found: list[Generated], gm: torch.fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
    modules: list[Generated] = []

    def keep(graph: Any, generated: Generated) -> Callable[..., Any]:
        modules.append(generated)
        return _cannot_run

    with code_is_kept(keep):
        compiled = inductor.compile_fx_inner(gm, inputs, **how)
    found += [replace(module, obstacle=_obstacle(gm, compiled, how)) for module in modules]
    return compiled


@contextlib.contextmanager
def code_is_kept(call_of: Callable[[Any, Generated], Callable[..., Any]]) -> Iterator[None]:
    """Inside, what Inductor generates is not loaded: `call_of(graph, generated)` is called in place of each module's `call`.

    `graph` is Inductor's GraphLowering.
    """

    def compile_to_module(graph: Any) -> types.SimpleNamespace:
        text, _ = graph.codegen()
        return types.SimpleNamespace(call=call_of(graph, Generated(text.value, _partitions(graph))))

    with (
        mock.patch.object(inductor.GraphLowering, "compile_to_module", compile_to_module),
        # Recording into a CUDA graph, which needs the device, comes after the code is made.
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
    """Autotuning without a device: nothing is timed, and the first of several choices wins."""
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
    """Operators that Inductor's scheduler runs outside of CUDA graphs, with its reasons."""
    if not inductor.config.graph_partition:
        return ()
    should: Callable[[Any], str | None] = graph.scheduler.should_partition
    found = []
    for node in graph.scheduler.nodes:
        if (reason := should(node)) is not None:
            origin = node.node.get_origin_node() if node.node is not None else None
            found.append(f"{origin.target if origin is not None else node.get_name()}: {reason}")
    return tuple(found)
