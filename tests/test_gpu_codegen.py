"""The GPU path end to end without a GPU: the module Inductor generates for backend="fp6", read and run.

The text is FileChecked; the same text runs through Triton's interpreter, and its numbers are held against float64.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import FileCheck

from fp6_compile.formats import FORMATS
from fp6_compile.quantize import dequantize, quantize
from tests.deviceless.codegen import generate_modules
from tests.support.codegen import check, interpret, swiglu_reference
from tests.support.models import SwiGLU

DIM, HIDDEN = 256, 384


CASES = [
    (torch.float16, "e3m2", None, 1),
    pytest.param(torch.bfloat16, "e2m3", 64, 13, marks=pytest.mark.slow),
    pytest.param(torch.float16, "e2m3", None, 40, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, "e3m2", 128, 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "fmt", "group_size", "m"), CASES)
def test_swiglu_block(dtype, fmt, group_size, m):
    """Two launches of ours: gate and up are one, down has the residual in its store. Bias, SiLU, product: a third kernel."""
    model, x = SwiGLU(DIM, HIDDEN).to(dtype).requires_grad_(False), torch.randn(m, DIM).to(dtype)
    options = {"format": fmt, "group_size": group_size, "strict": True}
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False, options=options)
    assert len(module.kernels) == 3, module.code
    assert module.code.count(".run(") == 3, module.code
    assert ["accumulate(" in text for text in module.kernels.values()] == [True, False, True], module.code
    assert "extern_kernels" not in module.code.split("async_compile.wait")[1]
    gate_up, product, down = module.kernels.values()
    FileCheck().check("from fp6_compile.kernels.triton.mm import accumulate").check("acc = accumulate(").run(gate_up)
    FileCheck().check("exp(").check("tl.store(out_ptr").run(product)
    FileCheck().check("acc = accumulate(").check("tl.load(in_ptr").check("tl.store(out_ptr").run(down)  # residual
    ((actual,),) = interpret([module])
    check(actual, swiglu_reference(model, x, fmt, group_size), dtype)


class Epilogue(nn.Module):
    """A linear and all that its store can be fused with."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, HIDDEN)

    def forward(self, x, gate, residual):
        return residual + F.silu(gate) * self.up(x)


def test_epilogue():
    """One launch: bias, SiLU, product and residual are in the store of the template kernel."""
    model, x = Epilogue().half().requires_grad_(False), torch.randn(4, DIM).half()
    gate, residual = torch.randn(2, 4, HIDDEN).half()
    (module,) = generate_modules(model, [x, gate, residual], backend="fp6", dynamic=False)
    (kernel,) = module.kernels.values()
    FileCheck().check("acc = accumulate(").check("exp(").check("tl.store(out_ptr").run(kernel)
    ((actual,),) = interpret([module])
    weight = dequantize(*quantize(model.up.weight, FORMATS["e2m3"]), FORMATS["e2m3"], None, torch.float64)
    up = x.double() @ weight.T + model.up.bias.double()
    check(actual, residual.double() + F.silu(gate.double()) * up, torch.float16)


class Projections(nn.Module):
    """Linears of one input. The second has rows for eight and a half blocks of 16, and is packed behind the others."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(DIM, 256), nn.Linear(DIM, 136), nn.Linear(DIM, 144, bias=False)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def test_projections():
    """q, k and v in one launch of ours; what is returned has the strides and the memory of an output of its own."""
    modules, expected = [], []
    for dtype, group_size in ((torch.float16, None), (torch.bfloat16, 64)):
        model, x = Projections().to(dtype).requires_grad_(False), torch.randn(3, DIM).to(dtype)
        (module,) = generate_modules(model, [x], backend="fp6", dynamic=False, options={"group_size": group_size})
        assert sum("accumulate(" in text for text in module.kernels.values()) == 1, module.code
        modules.append(module)
        for layer in (model.q, model.k, model.v):
            weight = dequantize(
                *quantize(layer.weight, FORMATS["e2m3"], group_size), FORMATS["e2m3"], group_size, torch.float64
            )
            expected.append((x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double()), dtype))
    actual = [output for outputs in interpret(modules) for output in outputs]
    for output, (reference, dtype) in zip(actual, expected, strict=True):
        check(output, reference, dtype)
        assert output.is_contiguous()


def test_no_copy_of_the_weight():
    """No buffer of the module is as large as a weight, and no float weight is an input."""
    model, x = SwiGLU(DIM, HIDDEN).half().requires_grad_(False), torch.randn(1, DIM).half()
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False)
    floats = [tensor for tensor in module.inputs if tensor.dtype == torch.float16]
    assert max(tensor.numel() for tensor in floats) == HIDDEN  # the bias
    allocations = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", module.code)
    assert allocations, module.code
    sizes = [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in allocations]
    assert max(sizes) < DIM * HIDDEN


def test_symbolic_batch_is_left_to_the_launcher():
    """One module for every batch; the size stays a symbol, and no tile is frozen by the first shape."""
    model = SwiGLU(DIM, HIDDEN).half().requires_grad_(False)
    batches = [torch.randn(m, DIM).half() for m in (5, 3, 70)]
    modules = generate_modules(model, *([x] for x in batches), backend="fp6", dynamic=True)
    assert len(modules) == 1, [module.code for module in modules]
    FileCheck().check_count("torch.ops.fp6.mm.default(", 2, exactly=True).run(modules[0].code)
    assert "accumulate" not in modules[0].code


class EverySecond(nn.Linear):
    """A linear of every second feature: its input has a stride of two along K."""

    def forward(self, x):
        return super().forward(x[..., ::2])


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((DIM,), id="vector", marks=pytest.mark.slow),
        pytest.param((0, DIM), id="empty", marks=pytest.mark.slow),
        pytest.param((2, 3, DIM), id="3-D", marks=pytest.mark.slow),
        pytest.param((3, 2 * DIM), id="strided", marks=pytest.mark.slow),
    ],
)
def test_shapes(shape):
    model = (nn.Linear if shape[-1] == DIM else EverySecond)(DIM, HIDDEN).half().requires_grad_(False)
    x = torch.randn(shape).half()
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False)
    ((actual,),) = interpret([module])
    weight = dequantize(*quantize(model.weight, FORMATS["e2m3"]), FORMATS["e2m3"], None, torch.float64)
    inputs = x if shape[-1] == DIM else x[..., ::2]
    expected = inputs.double() @ weight.T + model.bias.double()
    assert actual.shape == expected.shape
    if expected.numel():
        check(actual, expected, torch.float16)


def test_group_size_that_the_kernel_cannot_take_is_refused():
    model, x = nn.Linear(DIM, HIDDEN).half().requires_grad_(False), torch.randn(2, DIM).half()
    with pytest.raises(Exception, match="group_size: got 48, the GPU kernel needs a multiple of 32 or None"):
        generate_modules(model, [x], backend="fp6", options={"group_size": 48, "strict": True})
