"""Linears of one input are one launch, and are none the less linears of their own: which ones, how exact, how fresh."""

import gc
from unittest import mock

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import fp6_compile
from fp6_compile.backend import graph, weights
from tests.support.graphs import without_codegen
from tests.support.models import DIM, Attention, Heads, SwiGLU
from tests.support.references import close, dequantized_


class Scores(nn.Module):
    """Attention as far as the scores, and the values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, 128, bias=bias) for bias in (True, True, False))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 64)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q * k, v


class Products(nn.Module):
    """x @ w.T twice, and pieces of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(128, DIM) / 16) for _ in range(2))

    def forward(self, x):
        return x @ self.a.T, *(x @ self.b.T).split([32, 96], -1)


def _alone(candidates):
    return [[candidate] for candidate in candidates]


def _expected(model, x):
    """What the model returns without merging."""
    torch._dynamo.reset()
    with mock.patch.object(graph, "groups", _alone), torch.no_grad():
        return torch.compile(model, backend="fp6")(x)


class TestSnapshots(expecttest.TestCase):
    def _graph(self, model, x):
        with without_codegen() as captured, torch.no_grad():
            torch.compile(model.half(), backend="fp6")(x.half())
        return captured.after[0]

    def test_swiglu(self):
        graph = self._graph(SwiGLU(DIM, 384), torch.randn(4, DIM))
        self.assertExpectedInline(
            graph,
            """\
in0: f16[384]
in1: f16[4, 256]
in2: u8[192, 4, 2, 64]
in3: u8[192, 4, 64]
in4: f32[1, 768]
in5: u8[64, 6, 2, 64]
in6: u8[64, 6, 64]
in7: f32[1, 256]
mm0: f16[4, 768] = fp6.mm(in1, [in2, in3], in4, e2m3, cpu.v1, None)
slice0: f16[4, 384] = aten.slice.Tensor(mm0, 1, 0, 384)
add0: f16[4, 384] = aten.add.Tensor(slice0, in0)
convert_element_type0: f32[4, 384] = prims.convert_element_type(add0, torch.float32)
neg0: f32[4, 384] = aten.neg(convert_element_type0)
exp0: f32[4, 384] = aten.exp(neg0)
add1: f32[4, 384] = aten.add.Tensor(exp0, 1)
div0: f32[4, 384] = aten.div.Tensor(convert_element_type0, add1)
convert_element_type1: f16[4, 384] = prims.convert_element_type(div0, torch.float16)
slice1: f16[4, 384] = aten.slice.Tensor(mm0, 1, 384, 768)
mul0: f16[4, 384] = aten.mul.Tensor(convert_element_type1, slice1)
mm1: f16[4, 256] = fp6.mm(mul0, [in5, in6], in7, e2m3, cpu.v1, None)
add2: f16[4, 256] = aten.add.Tensor(in1, mm1)
return add2
""",
        )

    def test_projections(self):
        graph = self._graph(Scores(), torch.randn(2, 4, DIM))
        self.assertExpectedInline(
            graph,
            """\
in0: f16[2, 4, 256]
in1: f16[128]
in2: f16[128]
in3: u8[96, 4, 2, 64]
in4: u8[96, 4, 64]
in5: f32[1, 384]
view0: f16[8, 256] = aten.view(in0, [8, 256])
mm0: f16[8, 384] = fp6.mm(view0, [in3, in4], in5, e2m3, cpu.v1, None)
slice0: f16[8, 128] = aten.slice.Tensor(mm0, 1, 0, 128)
add0: f16[8, 128] = aten.add.Tensor(slice0, in1)
view1: f16[2, 4, 128] = aten.view(add0, [2, 4, 128])
view2: f16[2, 4, 2, 64] = aten.view(view1, [2, 4, 2, 64])
permute0: f16[2, 2, 4, 64] = aten.permute(view2, [0, 2, 1, 3])
slice1: f16[8, 128] = aten.slice.Tensor(mm0, 1, 128, 256)
add1: f16[8, 128] = aten.add.Tensor(slice1, in2)
view3: f16[2, 4, 128] = aten.view(add1, [2, 4, 128])
view4: f16[2, 4, 2, 64] = aten.view(view3, [2, 4, 2, 64])
permute1: f16[2, 2, 4, 64] = aten.permute(view4, [0, 2, 1, 3])
slice2: f16[8, 128] = aten.slice.Tensor(mm0, 1, 256, 384)
clone0: f16[8, 128] = aten.clone(slice2, torch.contiguous_format)
view5: f16[2, 4, 128] = aten.view(clone0, [2, 4, 128])
view6: f16[2, 4, 2, 64] = aten.view(view5, [2, 4, 2, 64])
permute2: f16[2, 2, 4, 64] = aten.permute(view6, [0, 2, 1, 3])
mul0: f16[2, 2, 4, 64] = aten.mul.Tensor(permute0, permute1)
return mul0, permute2
""",
        )


F16, BF16 = torch.float16, torch.bfloat16
MODELS = {
    "attention": (lambda: Attention(bias=False), (2, 3, DIM), BF16),
    "attention, biases": (Attention, (2, 3, DIM), F16),
    "swiglu": (lambda: SwiGLU(DIM, 384), (5, DIM), BF16),
    "heads": (lambda: Heads(128, 256, 132, bias=True), (5, DIM), BF16),
    "vector": (lambda: Heads(128, 256), (DIM,), F16),
    "products": (Products, (2, 3, DIM), F16),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("vector", "products") else pytest.mark.slow) for name in MODELS]
)
def test_through_inductor(name):
    """With real code generation: values, strides and storages are those of the graph that is not merged."""
    make, shape, dtype = MODELS[name]
    model, x = make().to(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        actual = torch.compile(model, backend="fp6")(x)
    assert counters["fp6"]["merged"] > 0
    # Inductor fuses, and so rounds, the rest of the graph in another way.
    leaves = torch.utils._pytree.tree_leaves
    for a, b, eager in zip(leaves(actual), leaves(_expected(model, x)), leaves(model(x)), strict=True):
        close(a, b)
        assert a.stride() == b.stride() == eager.stride()
        assert a.untyped_storage().nbytes() == eager.untyped_storage().nbytes()


@pytest.mark.parametrize(
    "options", [{}, {"format": "e2m3", "group_size": 64}, {"group_size": 48, "scale_method": "mse"}], ids=str
)
def test_exactly_what_they_are_alone(options, captured):
    """Every row of the weight is multiplied as before: not a bit changes."""
    model, x = Heads(128, 256, 132).half(), torch.randn(7, DIM).half()
    with torch.no_grad():
        actual = torch.compile(model, backend="fp6", options=options)(x)
        assert captured.matmuls() == 1
        torch._dynamo.reset()
        with mock.patch.object(graph, "groups", _alone):
            expected = torch.compile(model, backend="fp6", options=options)(x)
    assert captured.matmuls() == 3
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_report_names_the_others(captured):
    model = Attention().half()
    with torch.no_grad():
        torch.compile(model, backend="fp6")(torch.randn(1, 2, DIM).half())
    lines = {linear.name: linear for linear in fp6_compile.last_report().linears}
    assert list(lines) == ["q", "k", "v", "o"]
    assert [lines[name].note for name in "qkvo"] == ["merged with k, v", "merged with q, v", "merged with q, k", None]
    # Six bits a weight and four bytes a row.
    assert lines["k"].bytes_after == 128 * DIM * 6 // 8 + 128 * 4


@pytest.mark.parametrize(("sizes", "matmuls"), [((128, 130, 128), 1), ((130, 128), 1), ((130, 130, 128, 129), 3)])
def test_rows_that_fill_no_tile_come_last(sizes, matmuls, captured):
    """Each weight starts at a tile of its own; one that does not end at one can only be the last."""
    model, x = Heads(*sizes).half(), torch.randn(3, DIM).half()
    with torch.no_grad():
        actual = torch.compile(model, backend="fp6")(x)
    assert captured.matmuls() == matmuls
    torch.testing.assert_close(actual, _expected(model, x), rtol=0, atol=0)


class Function(nn.Module):
    """`function(x, *weights)` with the weights as the module's own parameters."""

    def __init__(self, function, *shapes) -> None:
        super().__init__()
        self.function = function
        for name, shape in zip("abc", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 16))

    def forward(self, x):
        return self.function(x, *[getattr(self, name) for name in "abc" if hasattr(self, name)])


NK, KN = (128, DIM), (DIM, 128)
# name: (model, matmuls that remain)
SEVERAL = {
    "linear": (Function(lambda x, a, b: (F.linear(x, a), F.linear(x, b)), NK, NK), 1),
    "x @ w": (Function(lambda x, a, b: (x @ a, x @ b), KN, KN), 1),
    "x @ w.T": (Function(lambda x, a, b: (x @ a.T, x @ b.T), NK, NK), 1),
    "addmm": (Function(lambda x, a, b: (torch.addmm(x[0, :128], x, a), torch.addmm(x[1, :128], x, b)), KN, KN), 1),
    "both ways round": (Function(lambda x, a, b: (x @ a, x @ b.T), KN, NK), 2),
    "other inputs": (Function(lambda x, a, b: (F.linear(x, a), F.linear(x + 1, b)), NK, NK), 2),
    "used twice": (Function(lambda x, a, b: (F.linear(x, a), F.linear(x, b), F.linear(x + 1, a)), NK, NK), 3),
    "einsum": (Function(lambda x, a, b: (torch.einsum("mk,nk->mn", x, a), torch.einsum("mk,nk->mn", x, b)), NK, NK), 2),
    "same weight": (Function(lambda x, a: (F.linear(x, a), F.linear(x, a, x[0, :128])), NK), 1),
    "input changed between": (Function(lambda x, a, b: (F.linear(y := x + 0, a), F.linear(y.add_(1), b)), NK, NK), 2),
    "input changed unseen": (
        Function(lambda x, a, b: (F.linear(y := x + 0, a), y.mul_(2), F.linear(y, b))[::2], NK, NK),
        2,
    ),
    "one too small": (Function(lambda x, a, b: (F.linear(x, a), F.linear(x, b)), NK, (64, DIM)), 1),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_what_is_merged(name, captured):
    model, matmuls = SEVERAL[name]
    model, x = model.half().requires_grad_(False), torch.randn(3, DIM).half()
    actual = torch.compile(model, backend="fp6")(x)
    assert captured.matmuls() == matmuls, captured.after[0]
    torch.testing.assert_close(actual, _expected(model, x), rtol=0, atol=0)


def test_skipped_one_stays_float(captured):
    model, x = Attention(bias=False).half(), torch.randn(1, 3, DIM).half()
    with torch.no_grad():
        _, _, v = torch.compile(model, backend="fp6", options={"skip": ["v"]})(x)
        assert [linear.note for linear in fp6_compile.last_report().linears] == [
            "merged with k",
            "merged with q",
            None,
            None,
        ]
        assert captured.matmuls() == 2
        close(v, model(x)[2])


def test_only_linears_of_one_module(captured):
    """Keys and values of all layers are made from one encoder's output: all of them at once would fill the memory."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([SwiGLU(DIM, 128) for _ in range(2)])

        def forward(self, x):
            return [layer.gate(x) + layer.up(x) for layer in self.layers]

    with torch.no_grad():
        torch.compile(Layers().half(), backend="fp6")(torch.randn(3, DIM).half())
    assert captured.matmuls() == 2


def test_not_finite_one_is_skipped_by_itself(captured):
    model, x = Heads(128, 128, 128).half().requires_grad_(False), torch.randn(3, DIM).half()
    model.heads[1].weight[0, 0] = float("inf")
    torch.compile(model, backend="fp6")(x)
    linears = fp6_compile.last_report().linears
    assert [linear.quantized for linear in linears] == [True, False, True]
    assert linears[1].reason == "fp6: cannot quantize heads.1: weight: 1 of 32768 values are NaN or infinite"


def test_dynamic_batch(captured):
    model = Attention().half()
    compiled = torch.compile(model, backend="fp6", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 5, DIM), (3, 4, DIM)):
            x = torch.randn(shape).half()
            actual = compiled(x)
            assert captured.matmuls() == 2
            assert len(captured.graphs) == 1
            reference = Attention().half()
            reference.load_state_dict(model.state_dict())
            dequantized_(reference, [f"{name}.weight" for name in "qkvo"])
            for a, b in zip(actual, reference(x), strict=True):
                close(a, b)


def test_autocast(captured):
    model, x = Heads(128, 128).half(), torch.randn(3, DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend="fp6")(x)
    assert counters["fp6"]["merged"] == 1


def test_gradient_of_the_input(captured):
    model, x = Heads(128, 256).half().requires_grad_(False), torch.randn(3, DIM).half()
    a, b = (torch.randn(3, n).half() for n in (128, 256))
    x.requires_grad_()
    one, two = torch.compile(model, backend="fp6")(x)
    ((one * a).sum() + (two * b).sum()).backward()
    assert counters["fp6"]["merged"] == 1
    dequantized_(model, ["heads.0.weight", "heads.1.weight"])
    close(x.grad, a @ model.heads[0].weight + b @ model.heads[1].weight)


# Freshness: a merged weight is looked after like any other, and by itself.


def _reference(model, x):
    copy = Heads(128, 128, 128).half()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        return dequantized_(copy, [f"heads.{i}.weight" for i in range(3)])(x)


def _check(compiled, model, x):
    for actual, expected in zip(compiled(x), _reference(model, x), strict=True):
        close(actual, expected)


@pytest.fixture
def merged(captured):
    """(model of three merged linears, compiled and called; its input; the compiled function)."""
    model, x = Heads(128, 128, 128).half().requires_grad_(False), torch.randn(3, DIM).half()
    compiled = torch.compile(model, backend="fp6")
    _check(compiled, model, x)
    assert captured.matmuls() == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield model, x, compiled


def _new(model, i):
    model.heads[i].weight = nn.Parameter(torch.randn(128, DIM).half() / 8, requires_grad=False)


def _load(model, **how):
    model.load_state_dict(Heads(128, 128, 128).half().state_dict(), **how)
    model.requires_grad_(False)


# name: (change, how many weights it changes)
CHANGES = {
    "copy_": (lambda model: model.heads[1].weight.copy_(torch.randn(128, DIM)), 1),
    "data swap": (lambda model: setattr(model.heads[2].weight, "data", torch.randn(128, DIM).half()), 1),
    "first is new": (lambda model: _new(model, 0), 1),
    "last is new": (lambda model: _new(model, 2), 1),
    "two are new": (lambda model: (_new(model, 0), _new(model, 1)), 2),
    "load_state_dict": (_load, 3),
    "load_state_dict, assign": (lambda model: _load(model, assign=True), 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_refreshes_its_rows_only(change, merged):
    """The others' rows are those that they were, and all three lie in one set."""
    model, x, compiled = merged
    function, changed = CHANGES[change]
    function(model)
    gc.collect()
    _check(compiled, model, x)
    (planes,), *others = (weights.planes_of(head.weight) for head in model.heads)
    assert others == [[planes]] * 2
    compiled(x)
    assert counters["fp6"]["weights_packed"] + counters["fp6"]["weights_refreshed"] == 3 + changed


@pytest.mark.parametrize("change", ["copy_", "data swap", "load_state_dict"])
def test_change_in_place(change, merged, monkeypatch):
    """As on a GPU, where CUDA graphs have recorded the addresses."""
    monkeypatch.setattr(weights.Planes, "is_in_place", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    model, x, compiled = merged
    (planes,) = weights.planes_of(model.heads[0].weight)
    addresses = [tensor.data_ptr() for tensor in planes.packing.tensors]
    CHANGES[change][0](model)
    _check(compiled, model, x)
    assert [tensor.data_ptr() for tensor in planes.packing.tensors] == addresses


def test_write_that_leaves_no_trace(merged):
    model, x, compiled = merged
    model.heads[1].weight.data.mul_(-3)
    fp6_compile.mark_weights_changed(model.heads[1])
    _check(compiled, model, x)
    assert counters["fp6"]["weights_refreshed"] == 1


def test_old_parameter_still_alive_keeps_its_planes(merged):
    """Going back and forth between two weights packs each once."""
    model, x, compiled = merged
    old = model.heads[1].weight
    _new(model, 1)
    new = model.heads[1].weight
    for weight in (new, old, new, old):
        model.heads[1].weight = weight
        _check(compiled, model, x)
    assert (counters["fp6"]["weights_packed"], counters["fp6"]["weights_refreshed"]) == (4, 0)


def test_planes_of_parameters_that_are_gone_are_not_hoarded(merged):
    """Even if the old parameter outlives the first call with the new one."""
    model, x, compiled = merged
    for _ in range(4):
        old = model.heads[1].weight
        _new(model, 1)
        _check(compiled, model, x)
        del old
        gc.collect()
    assert len(weights.planes_of(model.heads[0].weight)) == 1


def test_not_finite_change_is_an_error_and_changes_nothing(merged):
    model, x, compiled = merged
    before, saved = compiled(x), model.heads[1].weight.clone()
    model.heads[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="fp6: cannot quantize heads.1: weight: 1 of 32768 values are NaN or infinite"):
        compiled(x)
    model.heads[1].weight.copy_(saved)
    torch.testing.assert_close(compiled(x), before, rtol=0, atol=0)


def test_two_graphs_share_planes(captured):
    model = Heads(128, 128, 128).half().requires_grad_(False)
    compiled = torch.compile(model, backend="fp6", dynamic=False)
    x, y = torch.randn(3, DIM).half(), torch.randn(5, DIM).half()
    compiled(x), compiled(y)
    assert len(captured.graphs) == 2
    model.heads[2].weight.mul_(2)
    _check(compiled, model, x)
    _check(compiled, model, y)
    assert (counters["fp6"]["weights_packed"], counters["fp6"]["weights_refreshed"]) == (3, 1)


def test_alone_in_one_graph_and_merged_in_another(captured):
    """Packed for each, and fresh in each."""
    model, x = Heads(128, 128, 128).half().requires_grad_(False), torch.randn(3, DIM).half()
    alone, together = (torch.compile(f, backend="fp6") for f in (model.heads[0], model))
    for function in (alone, together, alone):
        function(x)
    assert counters["fp6"]["weights_packed"] == 4
    model.heads[0].weight.mul_(2)
    _check(together, model, x)
    close(alone(x), _reference(model, x)[0])
    assert counters["fp6"]["weights_refreshed"] == 2


def test_layers_that_look_alike_behind_a_graph_break(captured):
    """Dynamo runs one graph for both: each has its own planes, which are not made again on every call."""

    class Layer(SwiGLU):
        def forward(self, x):
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x

    model, x = nn.Sequential(Layer(DIM, 128), Layer(DIM, 128)).half().requires_grad_(False), torch.randn(3, DIM).half()
    compiled = torch.compile(model, backend="fp6")
    first = compiled(x)
    torch.testing.assert_close(compiled(x), first, rtol=0, atol=0)
    assert (counters["fp6"]["weights_packed"], counters["fp6"]["weights_refreshed"]) == (6, 0)
    assert counters["fp6"]["merged"] == len(captured.graphs) == 1
    model[1].up.weight.mul_(2)
    actual = compiled(x)
    assert counters["fp6"]["weights_refreshed"] == 1
    names = [f"{i}.{name}.weight" for i in range(2) for name in ("gate", "up", "down")]
    close(actual, dequantized_(model, names)(x), roundings=8)
