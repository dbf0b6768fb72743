"""The graph before and after the pass, as text. Accept changes with EXPECTTEST_ACCEPT=1 (and without xdist)."""

import expecttest
import pytest
import torch
from torch import nn
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from fp6_compile.backend.passes import FP6Pass
from tests.support.graphs import Captured, without_codegen
from tests.support.references import close, dequantized_


class Linears(nn.Module):
    """Q, K and V projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(256, n, bias=False) for n in (256, 128, 128))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 256)
        self.head = nn.Linear(256, 512, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


class Conv1D(nn.Module):
    """y = x @ W + b with W [K, N], as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 128) / 16)
        self.bias = nn.Parameter(torch.randn(128))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Products(nn.Module):
    """Matmuls without a weight, and a parameter that is multiplied pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(256, 256))

    def forward(self, x):
        return (x @ x.T) * self.gain


def _compile(model: nn.Module, x: torch.Tensor, **options) -> Captured:
    model = model.half().eval()
    with without_codegen() as captured, torch.no_grad():
        torch.compile(model, backend="fp6", options=options or None)(x)
    return captured


class TestSnapshots(expecttest.TestCase):
    def test_bias(self):
        graphs = _compile(nn.Linear(256, 128), torch.randn(4, 256).half())
        self.assertExpectedInline(
            graphs.before[0],
            """\
in0: f16[128]
in1: f16[4, 256]
in2: u8[32, 4, 2, 64]
in3: u8[32, 4, 64]
in4: f32[1, 128]
dequantize0: f16[128, 256] = fp6.dequantize([in2, in3], in4, e2m3, cpu.v1, None, 256, torch.float16)
permute0: f16[256, 128] = aten.permute(dequantize0, [1, 0])
addmm0: f16[4, 128] = aten.addmm(in0, in1, permute0)
return addmm0
""",
        )
        self.assertExpectedInline(
            graphs.after[0],
            """\
in0: f16[128]
in1: f16[4, 256]
in2: u8[32, 4, 2, 64]
in3: u8[32, 4, 64]
in4: f32[1, 128]
mm0: f16[4, 128] = fp6.mm(in1, [in2, in3], in4, e2m3, cpu.v1, None)
add0: f16[4, 128] = aten.add.Tensor(mm0, in0)
return add0
""",
        )

    def test_no_bias(self):
        graphs = _compile(nn.Linear(256, 128, bias=False), torch.randn(4, 256).half(), group_size=64, format="e2m3")
        self.assertExpectedInline(
            graphs.after[0],
            """\
in0: f16[4, 256]
in1: u8[32, 4, 2, 64]
in2: u8[32, 4, 64]
in3: f32[4, 128]
mm0: f16[4, 128] = fp6.mm(in0, [in1, in2], in3, e2m3, cpu.v1, 64)
return mm0
""",
        )

    def test_shared_input(self):
        graphs = _compile(Linears(), torch.randn(4, 256).half())
        self.assertExpectedInline(
            graphs.after[0],
            """\
in0: f16[4, 256]
in1: u8[128, 4, 2, 64]
in2: u8[128, 4, 64]
in3: f32[1, 512]
mm0: f16[4, 512] = fp6.mm(in0, [in1, in2], in3, e2m3, cpu.v1, None)
slice0: f16[4, 256] = aten.slice.Tensor(mm0, 1, 0, 256)
clone0: f16[4, 256] = aten.clone(slice0, torch.contiguous_format)
slice1: f16[4, 128] = aten.slice.Tensor(mm0, 1, 256, 384)
clone1: f16[4, 128] = aten.clone(slice1, torch.contiguous_format)
slice2: f16[4, 128] = aten.slice.Tensor(mm0, 1, 384, 512)
clone2: f16[4, 128] = aten.clone(slice2, torch.contiguous_format)
return clone0, clone1, clone2
""",
        )

    def test_tied_weight(self):
        graphs = _compile(Tied(), torch.tensor([1, 2, 3]))
        self.assertExpectedInline(
            graphs.after[0],
            """\
in0: f16[512, 256]
in1: i64[3]
in2: u8[128, 4, 2, 64]
in3: u8[128, 4, 64]
in4: f32[1, 512]
embedding0: f16[3, 256] = aten.embedding(in0, in1)
mm0: f16[3, 512] = fp6.mm(embedding0, [in2, in3], in4, e2m3, cpu.v1, None)
return mm0
""",
        )

    def test_conv1d(self):
        graphs = _compile(Conv1D(), torch.randn(4, 256).half())
        self.assertExpectedInline(
            graphs.before[0],
            """\
in0: f16[128]
in1: f16[4, 256]
in2: u8[32, 4, 2, 64]
in3: u8[32, 4, 64]
in4: f32[1, 128]
dequantize0: f16[128, 256] = fp6.dequantize([in2, in3], in4, e2m3, cpu.v1, None, 256, torch.float16)
permute0: f16[256, 128] = aten.permute(dequantize0, [1, 0])
addmm0: f16[4, 128] = aten.addmm(in0, in1, permute0)
return addmm0
""",
        )
        self.assertExpectedInline(
            graphs.after[0],
            """\
in0: f16[128]
in1: f16[4, 256]
in2: u8[32, 4, 2, 64]
in3: u8[32, 4, 64]
in4: f32[1, 128]
mm0: f16[4, 128] = fp6.mm(in1, [in2, in3], in4, e2m3, cpu.v1, None)
add0: f16[4, 128] = aten.add.Tensor(mm0, in0)
return add0
""",
        )

    def test_three_dimensions(self):
        graphs = _compile(nn.Linear(256, 128), torch.randn(2, 3, 256).half())
        self.assertExpectedInline(
            graphs.after[0],
            """\
in0: f16[128]
in1: f16[2, 3, 256]
in2: u8[32, 4, 2, 64]
in3: u8[32, 4, 64]
in4: f32[1, 128]
view0: f16[6, 256] = aten.view(in1, [6, 256])
mm0: f16[6, 128] = fp6.mm(view0, [in2, in3], in4, e2m3, cpu.v1, None)
add0: f16[6, 128] = aten.add.Tensor(mm0, in0)
view1: f16[2, 3, 128] = aten.view(add0, [2, 3, 128])
return view1
""",
        )

    def test_skipped(self):
        graphs = _compile(Linears(), torch.randn(4, 256).half(), skip=["q", "v"])
        self.assertExpectedInline(
            graphs.after[0],
            """\
in0: f16[256, 256]
in1: f16[4, 256]
in2: f16[128, 256]
in3: u8[32, 4, 2, 64]
in4: u8[32, 4, 64]
in5: f32[1, 128]
permute0: f16[256, 256] = aten.permute(in0, [1, 0])
mm0: f16[4, 256] = aten.mm(in1, permute0)
mm1: f16[4, 128] = fp6.mm(in1, [in3, in4], in5, e2m3, cpu.v1, None)
permute1: f16[256, 128] = aten.permute(in2, [1, 0])
mm2: f16[4, 128] = aten.mm(in1, permute1)
return mm0, mm1, mm2
""",
        )

    def test_no_match(self):
        graphs = _compile(Products(), torch.randn(256, 256).half())
        self.assertEqual(graphs.before, graphs.after)
        self.assertExpectedInline(
            graphs.after[0],
            """\
in0: f16[256, 256]
in1: f16[256, 256]
permute0: f16[256, 256] = aten.permute(in0, [1, 0])
mm0: f16[256, 256] = aten.mm(in0, permute0)
mul0: f16[256, 256] = aten.mul.Tensor(mm0, in1)
return mul0
""",
        )


def test_users_own_pass_is_kept(captured):
    """A pass that the user has set, globally or in the options, still runs, before ours."""
    seen = []

    def users_pass(graph):
        seen.append("fp6.dequantize" in str(graph))

    model = nn.Linear(256, 128).half()
    x = torch.randn(4, 256).half()
    with torch.no_grad():
        with torch._inductor.config.patch(joint_custom_pre_pass=users_pass):
            torch.compile(model, backend="fp6")(x)
        torch.compile(model, backend="fp6", options={"inductor": {"joint_custom_pre_pass": users_pass}})(x + 0)
    assert seen == [True, True]
    assert captured.targets() == ["fp6.mm", "aten.add.Tensor"]


def _through_the_pass(function, x):
    """(the graph of function(x, dequantized weight [256, 256]) after the pass, its result, the result before it)."""
    planes = [torch.zeros(256, 128, dtype=torch.uint8), torch.zeros(256, 64, dtype=torch.uint8), torch.ones(1, 256)]
    planes[0].random_(256)

    def f(x, *planes):
        return function(
            x, torch.ops.fp6.dequantize(planes[:2], planes[2], "e3m2", "planes.v1", None, 256, torch.float16)
        )

    gm = make_fx(f, tracing_mode="fake")(x, *planes)
    fake_mode = torch._guards.detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes])
    with fake_mode, V.set_fake_mode(fake_mode):  # as compile_fx has them
        FP6Pass("")(gm.graph)
    gm.recompile()
    return gm.graph, gm(x, *planes), f(x, *planes)


@pytest.mark.parametrize(
    "cut", [lambda w: w.view(128, 512), lambda w: w[:, ::2], lambda w: w[::2], lambda w: w[:, 64:]]
)
def test_views_that_are_not_the_weight(cut):
    """The strides tell a weight or some of its rows from another part or shape of it, whatever the chain of views."""
    x = torch.randn(3, cut(torch.empty(256, 256)).shape[1]).half()
    graph, actual, expected = _through_the_pass(lambda x, w: x @ cut(w).t(), x)
    assert not graph.find_nodes(op="call_function", target=torch.ops.fp6.mm.default)
    assert not graph.find_nodes(op="call_function", target=torch.ops.fp6.dequantize.default)  # decomposed
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w[32:160].t(),
        lambda x, w: x @ w.t()[:, 32:][:, :128],
        lambda x, w: torch.addmm(x[0, :128], x, w[32:160].t()),
        lambda x, w: w[32:160] @ x[0],
        lambda x, w: torch.bmm(x[None], w[32:160].t()[None]),
        lambda x, w: x @ w[32:33].t(),
    ],
)
def test_rows_of_the_weight(product):
    """Some rows of the weight are some columns of the product."""
    graph, actual, expected = _through_the_pass(product, torch.randn(3, 256).half())
    assert len(graph.find_nodes(op="call_function", target=torch.ops.fp6.mm.default)) == 1
    assert not graph.find_nodes(op="call_function", target=torch.ops.fp6.dequantize.default)
    close(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("factor", ["beta", "alpha"])
def test_addmm_with_factors_is_not_the_sum_that_it_looks_like(factor):
    """Inductor's matcher passes over keywords that a pattern does not name."""
    x = torch.randn(3, 256).half()
    graph, actual, expected = _through_the_pass(lambda x, w: torch.addmm(x[0], x, w.t(), **{factor: 0.5}), x)
    assert not graph.find_nodes(op="call_function", target=torch.ops.fp6.mm.default)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_gradient_of_the_input(captured):
    """Forward is fp6::mm; backward's `grad @ W` is no linear of the weight, and reads a decomposed dequantize."""
    model = nn.Linear(256, 128, bias=False).half().requires_grad_(False)
    x = torch.randn(4, 256).half().requires_grad_()
    torch.compile(model, backend="fp6")(x).sum().backward()
    assert "fp6.mm" in captured.targets()
    assert "fp6.dequantize" not in captured.targets()
    expected = dequantized_(model, ["weight"]).weight.sum(0).expand(4, -1)
    close(x.grad, expected)
