"""The CUDA module Inductor generates for a model, as text, on a machine without a GPU.

    (module,) = generate_modules(model, [x], backend="fp6")  # x and the weights of model are CPU tensors
    print(module.code)                                       # the Triton text, the wrapper and its launches
    (y,) = run_interpreted(module.code, module.inputs)       # the same text, run on the CPU (interpret.py)

Dynamo, AOTAutograd, joint and post-grad passes, lowerings, scheduler and CUDA codegen are the real ones. Only the last step,
which would load the text, is replaced (fp6_compile.fake_gpu.capture). A call of the module notes its arguments and returns
the fake outputs of the graph, so that models with several graphs, guards and recompiles go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._inductor.config as inductor_config

from fp6_compile.fake_gpu.capture import Generated, code_is_kept

from .fake_cuda import fake_cuda
from .fake_tensors import ValuedFakeMode, place, value_of

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

    def call_of(graph: Any, generated: Generated) -> Callable[[list[Any]], Sequence[Any]]:
        module = GeneratedModule(generated.code)
        modules.append(module)

        def call(args: list[Any]) -> Sequence[Any]:
            module.calls.append(list(args))
            with mode, mode.without_values():
                return graph.module(*args)

        return call

    with code_is_kept(call_of):
        yield modules


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
