"""The CUDA module Inductor generates for a model, as text, on a machine without a GPU.

    (module,) = generate_modules(model, [x], backend="fp6")  # x and the weights of model are CPU tensors
    print(module.code)                                       # the Triton text, the wrapper and its launches
    (y,) = run_interpreted(module.code, module.inputs)       # the same text, run on the CPU (interpret.py)

The whole stack is the real one: Dynamo, AOTAutograd, joint and post-grad passes, lowerings, scheduler, CUDA codegen. The
one thing replaced is the last step, where the text would be loaded. In its place stands a function that notes what it
was called with and returns the fake outputs of the graph, so that models with several graphs, guards and recompiles go on.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
from torch._inductor import output_code
from torch._inductor.graph import GraphLowering
from torch._inductor.select_algorithm import AlgorithmSelectorCache

from .fake_cuda import fake_cuda
from .fake_tensors import ValuedFakeMode, place, value_of

# Private names used in this file. GraphLowering.compile_to_module and its codegen(), the two cudagraph functions of
# output_code, and AlgorithmSelectorCache.lookup and .make_precompile_fn: torch 2.11, 2.13 and 2.15 (the arguments of the
# last two differ). This one was renamed in 2.15; both decide whether a fused epilogue is timed before it is taken.
_BENCHMARK_FUSION = "benchmark_template_fusion"
if not hasattr(inductor_config, _BENCHMARK_FUSION):
    _BENCHMARK_FUSION = "benchmark_epilogue_fusion"

# A tensor, or the size that a symbolic dimension had in that call.
Argument = torch.Tensor | int


@dataclass
class GeneratedModule:
    """One module Inductor generated, and what it was called with."""

    code: str
    calls: list[list[Argument]] = field(default_factory=list)

    @property
    def kernels(self) -> dict[str, str]:
        """The text of each Triton kernel, by its name, in the order of the file."""
        texts = self.code.split("async_compile.triton('")[1:]
        return {text.split("'", 1)[0]: text.split("'''")[1] for text in texts}

    @property
    def inputs(self) -> list[Argument]:
        """The CPU values of the latest call's arguments, in the order of the module's `call`."""
        return self.arguments(-1)

    def arguments(self, call: int) -> list[Argument]:
        """The same for the call of that index."""
        return [value_of(a) if isinstance(a, torch.Tensor) else int(a) for a in self.calls[call]]


@contextlib.contextmanager
def capture_modules(mode: ValuedFakeMode) -> Iterator[list[GeneratedModule]]:
    """Inside `fake_cuda() as mode`: collect every module Inductor generates, in place of loading it."""
    modules: list[GeneratedModule] = []

    def compile_to_module(graph: GraphLowering) -> types.SimpleNamespace:
        text, _ = graph.codegen()
        module = GeneratedModule(text.value)
        modules.append(module)

        def call(args: list[Any]) -> Sequence[Any]:
            module.calls.append(list(args))
            with mode, mode.without_values():
                return graph.module(*args)

        return types.SimpleNamespace(call=call)

    with (
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
        # Recording into a CUDA graph comes after the code is made (mode="reduce-overhead"), and needs the device.
        mock.patch.object(output_code, "cudagraph_post_compile", return_value=None),
        mock.patch.object(output_code, "cudagraph_partition_post_compile", return_value=None),
        _first_choice_wins(),
    ):
        yield modules


@contextlib.contextmanager
def _first_choice_wins() -> Iterator[None]:
    """Autotuning without a device: of several template choices the first appended is taken, nothing is timed."""

    def lookup(_: Any, choices: Sequence[Any], *args: Any, **kwargs: Any) -> dict[Any, float]:
        return {choice: float(rank) for rank, choice in enumerate(choices)}

    with (
        mock.patch.object(AlgorithmSelectorCache, "lookup", lookup),
        mock.patch.object(AlgorithmSelectorCache, "make_precompile_fn", return_value=dict),
        inductor_config.patch({_BENCHMARK_FUSION: False}),
    ):
        yield


def generate_modules(
    fn: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    *more_inputs: Sequence[torch.Tensor],
    sm: int = 90,
    config: Mapping[str, Any] | None = None,
    **how: Any,
) -> list[GeneratedModule]:
    """`torch.compile(fn, **how)` called on `inputs`, then on each of `more_inputs`: the modules Inductor generated.

    `fn` is a module, a GraphModule from make_fx, or a function of tensors. `inputs` and the parameters of a module are
    CPU tensors; they are copied to the fake device. `how` is torch.compile's backend, dynamic, mode, options and
    fullgraph; for one symbolic dimension mark the input with torch._dynamo.mark_dynamic. `config` patches
    torch._inductor.config, so a graph pass goes in as {"joint_custom_pre_pass": the_pass}.
    """
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        mode = stack.enter_context(fake_cuda(sm))
        stack.enter_context(inductor_config.patch(dict(config or {})))
        modules = stack.enter_context(capture_modules(mode))
        stack.enter_context(torch.no_grad())
        compiled = torch.compile(place(fn, mode) if isinstance(fn, torch.nn.Module) else fn, **how)
        for arguments in (inputs, *more_inputs):
            compiled(*(place(argument, mode) for argument in arguments))
        return modules


def generate_cuda_code(fn: Callable[..., Any], inputs: Sequence[torch.Tensor], **how: Any) -> str:
    """The text of the one module generated for `fn`; see `generate_modules` for the arguments."""
    (module,) = generate_modules(fn, inputs, **how)
    return module.code
