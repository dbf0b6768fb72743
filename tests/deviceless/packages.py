"""What AOTInductor generates for a CUDA device, as text, on a machine without a GPU.

It generates twice: a Python module, which it runs to compile and time the kernels, and then the C++ of the package, which
launches what they were compiled to. Here the module is not run, and what is known of a kernel is what its text says.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._dynamo.source import ConstantSource
from torch._inductor import codecache, graph
from torch._inductor import config as inductor_config
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fp6_compile.fake_gpu.capture import code_is_kept
from fp6_compile.fake_gpu.device import fake_device
from fp6_compile.fake_gpu.devices import DEVICES
from fp6_compile.fake_gpu.driver import no_self_test

# In the module, around what it computes: keeping the compiled kernels for the second time.
_KEEPING = re.compile(r"^    for kernel in globals\(\)\.values\(\):\n(?:        .*\n)+", re.MULTILINE)


class Package(NamedTuple):
    """`module`: the text of the Python module, without what keeps compiled kernels. `cpp`: that of the package."""

    module: str
    cpp: str


def generate_package(
    gm: torch.fx.GraphModule, inputs: list[torch.Tensor], dynamic: bool = False, **options: Any
) -> Package:
    """The package of a graph and CPU tensors like its inputs; if `dynamic`, the first one's first size is a symbol."""
    with (
        fake_device(DEVICES["H200"]),
        no_self_test(),
        inductor_config.patch({"fx_graph_cache": False}),
        torch.no_grad(),
    ):
        fakes = _fakes(inputs, dynamic)
        for node, fake in zip(gm.graph.nodes, fakes, strict=False):
            node.meta["val"] = fake
        with _texts() as texts:
            torch._inductor.aot_compile(gm, tuple(fakes), options={"triton.autotune_at_compile_time": False, **options})
    return Package(*texts)


def _fakes(inputs: list[torch.Tensor], dynamic: bool) -> list[torch.Tensor]:
    env, source = ShapeEnv(), ConstantSource("batch")
    shapes = [list(tensor.shape) for tensor in inputs]
    if dynamic:
        symbol = env.create_symbol(shapes[0][0], source, DimDynamic.DYNAMIC)
        shapes[0][0] = env.create_symintnode(symbol, hint=shapes[0][0], source=source)
    with FakeTensorMode(shape_env=env, allow_non_fake_inputs=True):
        return [torch.empty(s, dtype=t.dtype, device="cuda") for s, t in zip(shapes, inputs, strict=True)]


@contextlib.contextmanager
def _texts() -> Iterator[list[str]]:
    texts: list[str] = []

    def module(_: Any, generated: Any) -> Any:
        texts.append(_KEEPING.sub("", generated.code))
        for text in generated.code.split("async_compile.triton('")[1:]:
            codecache.CudaKernelParamCache.cache[text.split("'")[0]] = _compiled(text)
        return lambda inputs: None

    def cpp(_: Any, wrapper: str, *args: Any, **how: Any) -> str:
        texts.append(wrapper)
        return ""

    with (
        code_is_kept(module),
        mock.patch.dict(codecache.CudaKernelParamCache.cache),
        mock.patch.object(graph, "defake", lambda tensor: tensor),
        mock.patch.object(codecache.AotCodeCompiler, "compile", cpp),
    ):
        yield texts


def _compiled(text: str) -> dict[str, Any]:
    """What Inductor keeps of a compiled kernel: its arguments, from its text, and in the place of a cubin nothing."""
    known = {"DeviceProperties": DeviceProperties}
    triton, inductor = (
        eval(re.search(rf"{name}_meta=(\{{.*\}}),\n", text)[1], known) for name in ("triton", "inductor")
    )
    names = [name for name, kind in triton["signature"].items() if kind != "constexpr"]
    return {
        "inductor_meta": inductor,
        "triton_meta": triton,
        "def_args": [*names, *inductor.get("extra_launcher_args", [])],
        "call_args": names,
        "mangled_name": inductor["kernel_name"],
        "config": {"XBLOCK": 1},
        "num_warps": 4,
        "shared_mem": 0,
        "global_scratch": None,
        "profile_scratch": None,
        "cubin_path": "",
    }
