"""The torch.compile backend `fp6`: Dynamo's graph in, a compiled function out. Wiring only.

Dynamo graph --+-- linears.py   which inputs are weights of linears
               +-- merging.py   which of them multiply the same input
               +-- weights.py   their planes, packed once, kept fresh
               v
graph.py       the graph with three inputs (w4, w2, scale) and a fp6::dequantize in the place of each such weight
               v
compile_fx, with passes.py in the joint graph and lowerings/ behind fp6::mm
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import GraphModule

from fp6_compile import lowerings
from fp6_compile._compat.dynamo import TorchCompileInductorWrapper, registry
from fp6_compile._compat.inductor import compile_fx
from fp6_compile._compat.inductor import config as inductor_config
from fp6_compile._compat.torch import AutoDispatchBelowAutograd, FakeTensor
from fp6_compile.backend.graph import PackedGraph
from fp6_compile.backend.passes import FP6Pass
from fp6_compile.backend.weights import forget_weights
from fp6_compile.config import Options
from fp6_compile.formats import get_format
from fp6_compile.layouts.gpu_tiles import GPU_LAYOUTS
from fp6_compile.layouts.packing import lane_dtype
from fp6_compile.report import Report, forget_reports, publish

# Pointwise kernels that do not depend on each other are one launch: in attention the rotary embeddings of q and k, and the
# writes of k and v to the cache. Not reductions: with them in it, a kernel's block sizes fit nobody.
_ON_GPU = {"combo_kernels": True, "combo_kernels_pointwise_only": True}


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
        ValueError: an option is unknown or ill-typed; with `strict`, a linear cannot be quantized.
    """
    parsed = Options.parse(mode, options)
    on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in example_inputs)
    patches = inductor_patches(parsed, on_gpu)
    lowerings.register()
    packed = PackedGraph(gm, example_inputs, parsed)
    publish(Report(tuple(packed.linears), parsed.format))
    patches["joint_custom_pre_pass"].decisions += str(_verdicts(packed))
    compiled: Any = compile_fx(packed.gm, packed.inputs(), config_patches=patches)
    kept, weights = packed.kept, packed.weights

    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _check_no_tangents(args)
        inputs = [*(args[position] for position in kept), *weights.tensors(args)]
        if torch.is_grad_enabled():
            return compiled(*inputs)
        # fp6::mm's gradient is a Python kernel, and asking it whether it is needed takes longer than launching the matmul.
        with AutoDispatchBelowAutograd():
            return compiled(*inputs)

    return run


def _verdicts(packed: PackedGraph) -> list[str]:
    """What the self-tests said of the kernels for these weights: it decides on their code."""
    keys = [key for key in packed.weights.keys if key.device.type == "cuda" and key.spec.layout in GPU_LAYOUTS.values()]
    if not keys or any(isinstance(tensor, FakeTensor) for tensor in packed.planes()):
        return []
    from fp6_compile.kernels.selection.choices import may_use_wgmma  # here, because it imports Triton

    problems = {
        (key.device, lane_dtype(key.spec.layout), get_format(key.spec.format), key.spec.group_size) for key in keys
    }
    return sorted(f"{problem} {may_use_wgmma(*problem)}" for problem in problems)


def _check_no_tangents(args: Sequence[Any]) -> None:
    """Inductor's kernels drop the tangents of forward-mode AD without a word."""
    if any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args):
        raise NotImplementedError("fp6: compiled code has no forward-mode AD: call the model that was not compiled")


def _reset() -> None:
    forget_weights()
    forget_reports()


fp6.reset = _reset  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


class _Registry(dict[str, Any]):
    """torch's table of backends, in which `fp6` may be registered again, by itself.

    Threads that look it up first at the same moment register it one after the other, and torch asserts that there was none.
    """

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) and self[str(name)] is not fp6


registry._COMPILER_FNS = _Registry(registry._COMPILER_FNS)


def inductor_patches(options: Options, on_gpu: bool) -> dict[str, Any]:
    """Our defaults, settings of mode and user, and our pass after the passes that the user has set."""
    settings: dict[str, Any] = dict(_ON_GPU) if on_gpu else {}
    for option, mode, given in (("mode", options.mode, {}), ("inductor", None, dict(options.inductor))):
        try:
            # torch's own wrapper, because it knows the modes, checks names and types, and prepares CUPTI for CUDA graphs.
            settings |= TorchCompileInductorWrapper(mode, given, None).config
        except RuntimeError as error:
            raise ValueError(f"fp6: option {option!r}: {error}") from error
    if settings.get("use_joint_graph_passes") is False:
        raise ValueError(f"fp6: mode={options.mode!r} or use_joint_graph_passes=False turn off the pass that fp6 needs")
    theirs = settings.get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)
    before = theirs if isinstance(theirs, (list, tuple)) else [theirs] if theirs is not None else []
    return {**settings, "joint_custom_pre_pass": FP6Pass(repr(options), before)}
