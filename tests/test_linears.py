"""Every way to write a linear that is taken, and every reason to leave one alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fp6_compile
from fp6_compile.backend.find import names
from tests.support.references import close, dequantized_

N, K = 128, 256


class Form(nn.Module):
    """`function(x, weight)` with the weight as the module's own parameter."""

    def __init__(self, function, shape=(N, K)) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape) / 16)

    def forward(self, x):
        return self.function(x, self.weight)


# name: (function of x [..., K] and W, shape of W, dimensions of x). A shape (K, N) is packed transposed.
FORMS = {
    "linear": (lambda x, w: F.linear(x, w), (N, K), 2),
    "linear, keywords": (lambda x, w: F.linear(input=x, weight=w, bias=None), (N, K), 2),
    "linear, vector": (lambda x, w: F.linear(x, w), (N, K), 1),
    "linear, 4-D": (lambda x, w: F.linear(x, w), (N, K), 4),
    "linear, transposed": (lambda x, w: F.linear(x, w.T), (K, N), 2),
    "x @ w.T": (lambda x, w: x @ w.T, (N, K), 2),
    "x @ w.T, 3-D": (lambda x, w: x @ w.T, (N, K), 3),
    "x @ w.mT": (lambda x, w: x @ w.mT, (N, K), 3),
    "x @ w": (lambda x, w: x @ w, (K, N), 3),
    "matmul, transpose(0, 1)": (lambda x, w: torch.matmul(x, w.transpose(0, 1)), (N, K), 2),
    "matmul, transpose(-1, -2)": (lambda x, w: x.matmul(torch.transpose(w, -1, -2)), (N, K), 2),
    "mm, t()": (lambda x, w: torch.mm(x, w.t()), (N, K), 2),
    "mm, permute": (lambda x, w: x.mm(w.permute(1, 0)), (N, K), 2),
    "mm": (lambda x, w: torch.mm(x, w), (K, N), 2),
    "addmm": (lambda x, w: torch.addmm(torch.ones(N, dtype=x.dtype), x, w), (K, N), 2),
    "addmm, t()": (lambda x, w: torch.ones(N, dtype=x.dtype).addmm(x, w.t()), (N, K), 2),
    "einsum bk,nk->bn": (lambda x, w: torch.einsum("bk,nk->bn", x, w), (N, K), 2),
    "einsum bsk,kn->bsn": (lambda x, w: torch.einsum("bsk,kn->bsn", x, w), (K, N), 3),
    "einsum ...k,nk->...n": (lambda x, w: torch.einsum("...k,nk->...n", x, w), (N, K), 3),
    "einsum, weight first": (lambda x, w: torch.einsum("nk,bk->bn", w, x), (N, K), 2),
    "to(x.dtype)": (lambda x, w: F.linear(x, w.to(x.dtype)), (N, K), 2),
    "detach": (lambda x, w: F.linear(x, w.detach()), (N, K), 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantized(form, captured):
    function, shape, dims = FORMS[form]
    model = Form(function, shape).bfloat16()
    x = torch.randn(*(2, 3, 5)[: dims - 1], K).bfloat16()
    with torch.no_grad():
        actual = torch.compile(model, backend="fp6", fullgraph=True, options={"strict": True})(x)
        expected = dequantized_(model, ["weight^T" if shape == (K, N) else "weight"])(x)
    close(actual, expected)
    targets = captured.targets()
    assert "fp6.mm" in targets, targets
    assert not {"aten.mm", "aten.addmm", "aten.bmm", "aten.mv", "fp6.dequantize"} & set(targets), targets


def test_one_weight_both_ways_round(captured):
    """Read as [N, K] and as [K, N] it has two packings, with scales along different sides."""
    model = Form(lambda x, w: F.linear(F.linear(x, w) @ w, w)).half()
    with torch.no_grad():
        torch.compile(model, backend="fp6")(torch.randn(2, K).half())
    assert captured.targets() == ["fp6.mm"] * 3
    assert torch._dynamo.utils.counters["fp6"]["weights_packed"] == 2
    (linear,) = fp6_compile.last_report().linears
    assert linear.quantized


def test_packed_once_for_several_linears(captured):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(K, K, bias=False)
            self.b = nn.Linear(K, K, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model = Shared().half()
    x = torch.randn(3, K).half()
    with torch.no_grad():
        actual = torch.compile(model, backend="fp6")(x)
        close(actual, dequantized_(model, ["a.weight"])(x))
    assert torch._dynamo.utils.counters["fp6"]["weights_packed"] == 1
    assert captured.targets().count("fp6.mm") == 2


def test_tied_embedding_keeps_its_float_weight(captured):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(512, K)
            self.head = nn.Linear(K, 512, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            x = self.embed(tokens)
            return x, self.head(x)

    model = Tied().half()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        x, logits = torch.compile(model, backend="fp6")(tokens)
        torch.testing.assert_close(x, model.embed(tokens), rtol=0, atol=0)
        close(logits, F.linear(x, dequantized_(model, ["embed.weight"]).head.weight))
    (linear,) = fp6_compile.last_report().linears
    assert (linear.name, linear.quantized, linear.note) == ("head", True, "torch.float16 kept for embedding")


def test_weight_that_only_feeds_matmuls_leaves_the_graph(captured):
    model = nn.Linear(K, N, bias=False).half()
    with torch.no_grad():
        torch.compile(model, backend="fp6")(torch.randn(2, K).half())
    assert f"f16[{N}, {K}]" not in captured.before[0].split("dequantize")[0]


def test_submodules_behind_a_graph_break(captured):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(K, K)

        def forward(self, x):
            x = self.fc(x)
            torch._dynamo.graph_break()
            return torch.relu(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Inner(), Inner()
            self.head = nn.Linear(K, N)

        def forward(self, x):
            return self.head(self.second(self.first(x)))

    model = Outer().half()
    x = torch.randn(2, K).half()
    with torch.no_grad():
        compiled = torch.compile(model, backend="fp6")
        actual = compiled(x)
        again = compiled(x)
        close(actual, dequantized_(model, [name for name, _ in model.named_parameters() if "weight" in name])(x))
    torch.testing.assert_close(actual, again, rtol=0, atol=0)
    # Dynamo runs one graph for both layers: their planes are two all the same, and are not made again on every call.
    packed = torch._dynamo.utils.counters["fp6"]
    assert (packed["weights_packed"], packed["weights_refreshed"]) == (3, 0)


def test_dynamic_batch(captured):
    model = nn.Linear(K, N).half()
    compiled = torch.compile(model, backend="fp6", dynamic=True)
    reference = dequantized_(nn.Linear(K, N).half(), [])
    with torch.no_grad():
        for batch in (5, 3, 17):
            x = torch.randn(batch, K).half()
            reference.load_state_dict(model.state_dict())
            close(compiled(x), dequantized_(reference, ["weight"])(x))
    assert len(captured.graphs) == 1
    assert "fp6.mm" in captured.targets()


def _refused(model, x, captured, options=None, grad=False):
    with torch.set_grad_enabled(grad):
        expected = model(x)
        actual = torch.compile(model, backend="fp6", options=options)(x)
    torch.testing.assert_close(actual, expected)
    (linear,) = fp6_compile.last_report().linears
    assert not linear.quantized
    assert linear.bytes_after == linear.bytes_before
    assert not any("fp6" in target for target in captured.targets())
    return linear.reason


def test_skipped_requires_grad(captured):
    x = torch.randn(2, K).half()
    reason = _refused(nn.Linear(K, N).half(), x, captured, grad=True)
    assert reason == "requires grad while grad mode is on; use torch.no_grad() or requires_grad_(False)"


def test_skipped_float32_unless_asked(captured):
    model, x = nn.Linear(K, N), torch.randn(2, K)
    assert _refused(model, x, captured) == "float32 weight, and include_float32=True was not given"
    with torch.no_grad():
        actual = torch.compile(model, backend="fp6", options={"include_float32": True})(x)
        close(actual, dequantized_(model, ["weight"])(x), roundings=32)
    assert fp6_compile.last_report().linears[0].quantized


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_skipped_integer(dtype, captured):
    model = Form(lambda x, w: torch.mm(x, w.T))
    model.weight = nn.Parameter(torch.ones(N, K, dtype=dtype), requires_grad=False)
    assert _refused(model, torch.ones(2, K, dtype=dtype), captured) == f"{dtype} weight"


def test_skipped_float8(captured):
    model = Form(lambda x, w: F.linear(x, w.to(x.dtype)))
    model.weight = nn.Parameter(torch.ones(N, K).to(torch.float8_e4m3fn), requires_grad=False)
    assert _refused(model, torch.randn(2, K).half(), captured) == "torch.float8_e4m3fn weight"


def test_skipped_too_small(captured):
    reason = _refused(nn.Linear(64, N).half(), torch.randn(2, 64).half(), captured)
    assert reason == "fewer than 128 inputs or outputs (min_features)"
    reason = _refused(nn.Linear(K, N).half(), torch.randn(2, K).half(), captured, {"min_features": 512})
    assert reason == "fewer than 512 inputs or outputs (min_features)"


@pytest.mark.parametrize("glob", ["1", "?", "*"])
def test_skipped_by_name(glob, captured):
    model = nn.Sequential(nn.ReLU(), nn.Linear(K, N)).half()
    assert _refused(model, torch.randn(2, K).half(), captured, {"skip": [glob]}) == f"skipped by {glob!r}"


MUTATIONS = {
    "mul_": lambda x, w: F.linear(x, w.mul_(1)),
    "add_": lambda x, w: (w.t().add_(0), F.linear(x, w))[1],
    "setitem": lambda x, w: (w.__setitem__((0, 0), 1.0), F.linear(x, w))[1],
    "copy_": lambda x, w: (w.copy_(w * 1), F.linear(x, w))[1],
    "_foreach_mul_": lambda x, w: (torch._foreach_mul_([w], 1.0), F.linear(x, w))[1],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_skipped_mutated_in_the_graph(name, captured):
    model = Form(MUTATIONS[name]).half().requires_grad_(False)
    assert _refused(model, torch.randn(2, K).half(), captured) == f"changed in the graph by {name}"


def test_skipped_three_dimensions(captured):
    model = Form(lambda x, w: x @ w[1], (3, K, N)).half()
    assert _refused(model, torch.randn(2, K).half(), captured) == "a 3-D weight"


def test_skipped_partial_use(captured):
    model = Form(lambda x, w: F.linear(x, w[:64])).half()
    assert _refused(model, torch.randn(2, K).half(), captured) == "multiplied only through getitem"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (w @ x.T).T,
        lambda x, w: torch.addmm(x[:, :N], x, w.T, beta=0.5),
        lambda x, w: torch.bmm(x[None], w.T[None])[0],
    ],
    ids=["left operand", "addmm with beta", "bmm"],
)
def test_skipped_place(function, captured):
    """Matmuls in which the weight is not where a linear has it."""
    reason = _refused(Form(function).half(), torch.randn(2, K).half(), captured)
    assert reason.startswith("multiplied only through ")


def test_skipped_tensor_subclass(captured):
    """Such as a weight that another library has quantized."""
    model = Form(F.linear)
    model.weight = nn.Parameter(TwoTensor(torch.randn(N, K).half(), torch.randn(N, K).half()), requires_grad=False)
    with torch.no_grad():
        torch.compile(model, backend="fp6")(torch.randn(2, K).half())
    (linear,) = fp6_compile.last_report().linears
    assert linear.reason == "a tensor subclass, TwoTensor"


def test_skipped_device(captured):
    model = Form(F.linear).half().to("meta")
    with torch.no_grad():
        torch.compile(model, backend="fp6")(torch.empty(2, K, device="meta").half())
    (linear,) = fp6_compile.last_report().linears
    assert linear.reason == "on device 'meta'"


def test_skipped_buffer(captured):
    model = nn.Linear(K, N, bias=False).half()
    weight = model.weight.detach()
    del model.weight
    model.register_buffer("weight", weight)
    assert _refused(model, torch.randn(2, K).half(), captured) == "not an nn.Parameter"


class Planes(nn.Module):
    """A linear that calls fp6::mm itself, with planes that are buffers."""

    def __init__(self) -> None:
        super().__init__()
        packed = fp6_compile.PackedTensor.quantize(torch.randn(128, 128).bfloat16())
        self.how = (packed.spec.format, packed.spec.layout, packed.spec.group_size)
        for name, tensor in zip(("w4", "w2", "scale"), (*packed.planes, packed.scale), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x):
        return torch.ops.fp6.mm(x, (self.w4, self.w2), self.scale, *self.how)


def test_planes_of_fp6_mm_are_no_weights(captured):
    """A model that is packed already has nothing left to take, and nothing that was refused."""
    layer = Planes()
    with torch.no_grad():
        torch.compile(layer, backend="fp6", fullgraph=True)(torch.randn(2, 128).bfloat16())
    assert fp6_compile.last_report().linears == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skipped_not_finite(bad, captured):
    model = nn.Linear(K, N, bias=False).half().requires_grad_(False)
    model.weight[3, 4] = bad
    x = torch.randn(2, K).half()
    with torch.no_grad():
        torch.compile(model, backend="fp6")(x)
    (linear,) = fp6_compile.last_report().linears
    assert linear.reason == "fp6: cannot quantize weight: weight: 1 of 32768 values are NaN or infinite"


def test_skipped_made_in_inference_mode(captured):
    with torch.inference_mode():
        model, x = nn.Linear(K, N).half(), torch.randn(2, K).half()
        torch.compile(model, backend="fp6")(x)
    (linear,) = fp6_compile.last_report().linears
    assert linear.reason == "made in inference mode, so that later changes could not be noticed"


def test_called_in_inference_mode(captured):
    model, x = nn.Linear(K, N).half(), torch.randn(2, K).half()
    with torch.inference_mode():
        actual = torch.compile(model, backend="fp6")(x)
    close(actual, dequantized_(model, ["weight"])(x))


def test_strict_raises_for_what_cannot_be_quantized(captured):
    model, x = nn.Linear(K, N), torch.randn(2, K)
    with torch.no_grad(), pytest.raises(Exception, match="fp6: strict: cannot quantize .*: float32 weight"):
        torch.compile(model, backend="fp6", options={"strict": True})(x)


def test_strict_allows_what_was_excluded(captured):
    model, x = nn.Linear(64, N).half(), torch.randn(2, 64).half()
    with torch.no_grad():
        torch.compile(model, backend="fp6", options={"strict": True})(x)


def test_names_of_modules_that_were_found_through_a_dict():
    """As Dynamo finds them in a module with a __getattr__ of its own, such as PEFT's."""
    source = "L['self'].__dict__['_modules']['base_model']._modules['layers']._modules['0']._parameters['weight']"
    assert names._path(source) == "base_model.layers.0.weight"
