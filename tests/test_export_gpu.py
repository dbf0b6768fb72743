"""AOTInductor's code for GPUs: packages launch our Triton kernel, for any batch, and call no Python."""

import re

import pytest
import torch
from torch import nn

from fp6_compile import lowerings
from fp6_compile.formats import get_format
from fp6_compile.layouts.gpu_tiles import GPU_LAYOUTS
from fp6_compile.layouts.packing import pack
from fp6_compile.quantize import dequantize, quantize
from tests.deviceless.interpret import run_interpreted_all
from tests.deviceless.packages import generate_package

# torch copies its own tree specs of exported graphs.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
LAYOUT = GPU_LAYOUTS[torch.float16]


class Graph(nn.Module):
    """What is left of an exported linear when AOTInductor has unwrapped the packed weight."""

    def forward(self, x, w4, w2, scale):
        return (torch.relu(torch.ops.fp6.mm(x, [w4, w2], scale, "e2m3", LAYOUT, None)),)


def _generated(rows, n=128, k=256, **how):
    lowerings.register()
    torch.manual_seed(0)
    codes, scale = quantize(torch.randn(n, k), get_format("e2m3"), None)
    weight = [*pack(codes, get_format("e2m3"), LAYOUT), scale]
    package = generate_package(torch.fx.symbolic_trace(Graph()), [torch.randn(rows, k).half(), *weight], **how)
    return package, weight, dequantize(codes, scale, get_format("e2m3"), None, torch.float32)


def _calls_no_python(package):
    kernel = re.search(r"    (call_triton_tem_fused\w*mm\w*)\(", package.cpp)
    assert kernel
    assert "= loadKernel(" in package.cpp
    return not re.findall(r"aoti_torch_proxy_executor_call_function|mm_by_aten", package.cpp)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_package_launches_the_kernel(dynamic):
    package, weight, w = _generated(4, dynamic=dynamic)
    assert _calls_no_python(package)
    code = package.module.replace("USE_ASM : tl.constexpr = True", "USE_ASM : tl.constexpr = False")
    xs = [torch.randn(rows, 256).half() for rows in ((4, 19) if dynamic else (4,))]
    for x, (out,) in zip(xs, run_interpreted_all([(code, [x, *weight]) for x in xs]), strict=True):
        torch.testing.assert_close(out, torch.relu(x.float() @ w.T).half(), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(("rows", "dynamic"), [(2048, False), (2048, True), (16, True), (1, False)])
def test_no_package_calls_python(rows, dynamic, tuned):
    """Not for a batch that is multiplied faster by a dequantized copy elsewhere, nor for one that varies."""
    package, *_ = _generated(rows, k=4096, dynamic=dynamic, max_autotune=tuned)
    assert _calls_no_python(package)
    (parts,) = {int(parts) for parts in re.findall(r"SPLIT_K : tl.constexpr = (\d+)", package.module)}
    assert (parts > 1) == (rows == 1)
