"""Split K, ATen's matmul and autotuning in the code that Inductor generates, read and run without a GPU."""

import re

import pytest
import torch
from torch import nn
from torch.testing import FileCheck

from fp6_compile.explanation.trace.launches import launches
from fp6_compile.formats import FORMATS
from fp6_compile.kernels.selection import selftest
from fp6_compile.lowerings import mm as lowering
from fp6_compile.quantize import dequantize, quantize
from tests.deviceless.codegen import generate_modules
from tests.support.codegen import check, interpret, swiglu_reference
from tests.support.models import SwiGLU

DIM, HIDDEN = 2048, 1024


class Block(nn.Module):
    """What follows an MLP in a transformer: the residual sum, and the next layer's norm of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = SwiGLU(DIM, HIDDEN)
        self.norm = nn.RMSNorm(DIM)

    def forward(self, x):
        x = self.mlp(x)
        return x, self.norm(x)


@pytest.fixture(autouse=True)
def wgmma(monkeypatch):
    """The self-test's answer: it cannot run on a device that is only fake."""
    monkeypatch.setattr(selftest, "passes", lambda *problem, **_: False)


def split_of(kernel: str) -> int:
    return int(re.search(r"SPLIT_K : tl.constexpr = (\d+)", kernel)[1])


MODES = [None, "max-autotune-no-cudagraphs"]


@pytest.mark.slow
def test_the_last_program_adds_up_and_keeps_the_epilogue():
    """No reduction follows: a launch for gate and up, one for what joins them, one for down, one for the locks of all."""
    torch.manual_seed(0)
    model, x = SwiGLU(DIM, HIDDEN).half().requires_grad_(False), torch.randn(3, DIM).half()
    modules = [m for mode in MODES for m in generate_modules(model, [x], backend="fp6", dynamic=False, mode=mode)]
    for module in modules:
        zeros, gate_and_up, silu, down = module.kernels.values()
        assert len(launches(module.code)) == 4, module.code
        FileCheck().check("4096").check("tl.store(out_ptr0").run(zeros)
        for kernel in (gate_and_up, down):
            assert split_of(kernel) > 1
            FileCheck().check("acc = accumulate(").check("acc, last = reduce(").check("mask & last").run(kernel)
        FileCheck().check_not("accumulate").check("exp(").check("tl.store(out_ptr").run(silu)
        FileCheck().check("reduce(").check("tl.load(in_ptr").check("tl.store(out_ptr").run(down)
    for (actual,) in interpret(modules):
        check(actual, swiglu_reference(model, x), torch.float16)


@pytest.mark.slow
def test_parts_are_added_by_the_kernel_that_follows():
    """RMSNorm reduces anyway: its kernel adds the parts and the residual, and the matmul stores float32 parts."""
    torch.manual_seed(0)
    model, x = Block().bfloat16().requires_grad_(False), torch.randn(2, DIM).bfloat16()
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False)
    *_, down, norm = module.kernels.values()
    assert split_of(down) == 2
    FileCheck().check("acc = accumulate(").check_not("reduce(acc").check("pid_k").check("tl.store(out_ptr").run(down)
    FileCheck().check("rsqrt").run(norm)
    assert launches(module.code)[-1].startswith(("triton_red", "triton_per"))
    assert f"(2, 2, {DIM}), ({2 * DIM}, {DIM}, 1)" in module.code
    ((total, normed),) = interpret([module])
    check(total, swiglu_reference(model.mlp, x), torch.bfloat16)
    expected = nn.functional.rms_norm(swiglu_reference(model.mlp, x), [DIM], eps=torch.finfo(torch.bfloat16).eps)
    check(normed, expected, torch.bfloat16)


class Rotated(nn.Linear):
    """A projection and its rotary embedding, which reads every output twice, in two places."""

    def forward(self, x):
        q = super().forward(x).view(x.shape[0], -1, 64)
        half = torch.cat([-q[..., 32:], q[..., :32]], -1)
        return q * 0.5 + half * 0.25


@pytest.mark.slow
def test_a_sum_that_is_read_twice_gets_no_kernel_of_its_own():
    torch.manual_seed(0)
    model, x = Rotated(DIM, HIDDEN).half().requires_grad_(False), torch.randn(2, DIM).half()
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False)
    _zeros, matmul, rotation = launches(module.code)
    FileCheck().check("acc, last = reduce(").run(module.kernels[matmul])
    FileCheck().check_not("accumulate").check("tl.where").run(module.kernels[rotation])
    ((actual,),) = interpret([module])
    weight = dequantize(*quantize(model.weight, FORMATS["e2m3"]), FORMATS["e2m3"], None, torch.float64)
    q = (x.double() @ weight.T + model.bias.double()).view(2, -1, 64)
    check(actual, q * 0.5 + torch.cat([-q[..., 32:], q[..., :32]], -1) * 0.25, torch.float16)


def linear(m: int, n: int = 1024, k: int = 1024) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(m)
    return nn.Linear(k, n, bias=False).half().requires_grad_(False), torch.randn(m, k).half()


def test_many_rows_are_left_to_atens_matmul():
    model, x = linear(2048)
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False)
    FileCheck().check("torch.ops.fp6.mm.default(").run(module.code)
    assert not module.kernels


@pytest.mark.slow
def test_wgmma_where_it_has_passed(monkeypatch):
    monkeypatch.setattr(selftest, "passes", lambda *problem, **_: True)
    model, x = linear(100, 256)
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False)
    (kernel,) = (text for text in module.kernels.values() if "accumulate(" in text)
    assert "JOIN : tl.constexpr = 4" in kernel
    assert "num_warps=8" in kernel
    ((actual,),) = interpret([module])
    weight = dequantize(*quantize(model.weight, FORMATS["e2m3"]), FORMATS["e2m3"], None, torch.float64)
    check(actual, x.double() @ weight.T, torch.float16)


class Einsum(nn.Linear):
    """The same, but a bmm in the graph."""

    def forward(self, x):
        return torch.einsum("bsk,nk->bsn", x, self.weight)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(nn.Linear, torch.float16, marks=pytest.mark.slow),
        pytest.param(Einsum, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(nn.Linear, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(Einsum, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_one_row_is_not_decomposed_by_max_autotune(make, dtype):
    """Coordinate descent makes x * w, summed, of such a matmul before any pass sees it: the pass takes that form, too."""
    torch.manual_seed(0)
    model, x = make(512, 256, bias=False).to(dtype).requires_grad_(False), torch.randn(1, 1, 512).to(dtype)
    (module,) = generate_modules(model, [x], backend="fp6", dynamic=False, mode="max-autotune-no-cudagraphs")
    assert sum("accumulate(" in kernel for kernel in module.kernels.values()) == 1
    ((actual,),) = interpret([module])
    weight = dequantize(*quantize(model.weight, FORMATS["e2m3"]), FORMATS["e2m3"], None, torch.float64)
    check(actual, x.double() @ weight.T, dtype)


@pytest.mark.parametrize(("m", "aten"), [(1, False), (100, True), (2048, True)])
def test_choices_that_are_timed(monkeypatch, m, aten):
    """At most six, all on the same inputs, ATen's matmul among them where there are many rows."""
    seen = []
    best = lowering._best
    monkeypatch.setattr(lowering, "_best", lambda choices, *rest: seen.append(choices) or best(choices, *rest))
    model, x = linear(m, 4096)
    generate_modules(model, [x], backend="fp6", dynamic=False, mode="max-autotune-no-cudagraphs")
    (choices,) = seen
    assert 2 <= len(choices) <= 6
    names = [choice.name for choice in choices]
    assert any("aten" in name for name in names) == aten
    assert len({len(choice.input_nodes) for choice in choices}) == 1
