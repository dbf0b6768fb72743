"""fp6::mm in the graphs that vLLM compiles: its lowering on GPUs, and our sources in the cache keys.

vLLM runs one pass of the user's after its own, on the graph that Inductor lowers, and puts its `uuid` into its own cache key
and into Inductor's. Ours changes no graph: Inductor's lowering of fp6::mm (fp6_compile.lowerings) does all. With a known
M, which vLLM's setting `compile_sizes` gives, it is a Triton template with its epilogue fused; otherwise a call of the
launcher, which picks its tile by M.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.fx import Graph

from fp6_compile.formats import get_format
from fp6_compile.integrations.vllm.compat import InductorPass, inductor_settings
from fp6_compile.layouts.packing import lane_dtype
from fp6_compile.lowerings import register, source_hash
from fp6_compile.packed.tensor import PackedTensor

# What the self-tests of this process's GPU said: it decides on code.
_verdicts: set[str] = set()


class Fp6Pass(InductorPass):
    """Registers the lowering where a graph multiplies on a GPU. `before`: the user's pass, which runs first."""

    def __init__(self, before: Any = None) -> None:
        self.before = before

    def __call__(self, graph: Graph) -> None:
        if self.before is not None:
            self.before(graph)
        calls = graph.find_nodes(op="call_function", target=torch.ops.fp6.mm.default)
        if any(node.args[0].meta["val"].is_cuda for node in calls):
            register()

    def uuid(self) -> str:
        """Of the package's sources, the self-tests' verdicts, and the user's pass."""
        before = None if self.before is None else self.before.uuid()
        return hashlib.sha256(repr((source_hash(), sorted(_verdicts), before)).encode()).hexdigest()


def install_pass() -> None:
    """Put the pass into the settings of the model that is being made, once, after the user's."""
    settings, key = inductor_settings()
    if not isinstance(settings.get(key), Fp6Pass):
        settings[key] = Fp6Pass(settings.get(key))


def note_selftest(weight: PackedTensor) -> None:
    """Test now whether wgmma may be used for `weight`: before anything is compiled, and before CUDA graphs are captured."""
    if weight.device.type != "cuda":
        return
    from fp6_compile.kernels.selection.choices import may_use_wgmma  # here, because it imports Triton

    spec = weight.spec
    problem = weight.device, lane_dtype(spec.layout), get_format(spec.format), spec.group_size
    _verdicts.add(f"{problem} {may_use_wgmma(*problem)}")
