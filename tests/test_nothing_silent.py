"""Every weight that a matmul reads is taken, or named with the reason: fused attention, functions, computed weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fp6_compile
from tests.support.references import close, dequantized_

N = 128
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def _attention(**kwargs):
    return nn.MultiheadAttention(N, 4, **kwargs).bfloat16().eval()


def _encoder_layer(**kwargs):
    return nn.TransformerEncoderLayer(N, 4, 256, **{"batch_first": True, **kwargs}).bfloat16().eval()


def _lines():
    return {linear.name: linear for report in fp6_compile.reports() for linear in report.linears}


def _compare(model, *args, dynamic=None, **kwargs):
    """Against eager code by dequantized weights."""
    with torch.no_grad():
        actual = torch.compile(model, backend="fp6", dynamic=dynamic, options={"strict": True})(*args, **kwargs)
        names, parameters = list(_lines()), dict(model.named_parameters())
        weights = [name if name in parameters else f"{name}.weight" for name in names]
        expected = dequantized_(copy.deepcopy(model), weights)(*args, **kwargs)
    close(actual, expected, roundings=8) if isinstance(actual, torch.Tensor) else _close_tuples(actual, expected)
    return set(names)


def _close_tuples(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            close(a, e, roundings=8)


@pytest.mark.parametrize(
    "kwargs", [{}, {"key_padding_mask": PADDING}, {"attn_mask": CAUSAL}], ids=["", "padding", "mask"]
)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_quantized(batch_first, need_weights, kwargs, captured):
    x = torch.randn(2, 5, N).bfloat16()
    x = x if batch_first else x.transpose(0, 1)
    names = _compare(_attention(batch_first=batch_first), x, x, x, need_weights=need_weights, **kwargs)
    assert names == {"in_proj_weight", "out_proj"}
    assert captured.targets().count("fp6.mm") == 2


@pytest.mark.slow
def test_attention_with_a_dynamic_batch(captured):
    model, x = _attention(batch_first=True), torch.randn(2, 5, N).bfloat16()
    _compare(model, x, x, x, dynamic=True)
    assert captured.targets().count("fp6.mm") == 2
    assert "fp6.dequantize" not in captured.targets()


def test_attention_to_other_dimensions(captured):
    """q, k and v have weights of their own then."""
    x, y = torch.randn(2, 5, N).bfloat16(), torch.randn(2, 7, 256).bfloat16()
    names = _compare(_attention(batch_first=True, kdim=256, vdim=256), x, y, y)
    assert names == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"}


def test_cross_attention_keeps_its_common_weight_with_a_reason(captured):
    x, y = torch.randn(2, 5, N).bfloat16(), torch.randn(2, 7, N).bfloat16()
    model = _attention(batch_first=True)
    with torch.no_grad():
        torch.compile(model, backend="fp6")(x, y, y)
        lines = _lines()
        assert lines["out_proj"].quantized
        assert lines["in_proj_weight"].reason.startswith("multiplied only through ")
        torch._dynamo.reset()
        with pytest.raises(Exception, match="fp6: strict: cannot quantize in_proj_weight: multiplied only through"):
            torch.compile(model, backend="fp6", options={"strict": True})(x, y, y)


@pytest.mark.parametrize("masks", [{}, {"src_mask": CAUSAL}, {"src_key_padding_mask": PADDING}, "both"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=["", "norm first, gelu"])
def test_an_encoder_layer_is_quantized(options, masks, captured):
    masks = {"src_mask": CAUSAL, "src_key_padding_mask": PADDING} if masks == "both" else masks
    names = _compare(_encoder_layer(**options), torch.randn(2, 5, N).bfloat16(), **masks)
    assert names == {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}
    assert captured.targets().count("fp6.mm") == 4


def test_an_encoder_in_training_gets_its_gradients(captured):
    model = nn.TransformerEncoder(_encoder_layer(dropout=0.0).float(), 2, enable_nested_tensor=False).train()
    compiled, x = copy.deepcopy(model), torch.randn(2, 5, N)
    model(x).square().sum().backward()
    torch.compile(compiled, backend="fp6")(x).square().sum().backward()
    assert sum(name.endswith("in_proj_weight") for name in _lines()) == 2
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


class Form(nn.Module):
    """`function(x, *weights)` with weights of its own."""

    def __init__(self, function, *shapes) -> None:
        super().__init__()
        self.function = function
        self.names = [f"w{i}" for i in range(len(shapes))]
        for name, shape in zip(self.names, shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.randn(shape) / 16))

    def forward(self, x):
        return self.function(x, *[getattr(self, name) for name in self.names])


def _lstm(x, *weights):
    state = torch.zeros(1, 1, N), torch.zeros(1, 1, N)
    return torch.lstm(x[:, None], state, list(weights), False, 1, 0.0, False, False, False)[0]


SQUARE = (N, N)
# name: (function of x [4, N] and weights, their shapes; of each, its reason, None if it is taken, "" if it is no weight).
HIDDEN = {
    "mask": (lambda x, w, m: F.linear(x, w * m), [SQUARE, SQUARE], ["mul", "mul"]),
    "adapter": (lambda x, w, a, b: F.linear(x, w + a @ b), [SQUARE, SQUARE, SQUARE], ["add", "matmul", None]),
    "cat": (lambda x, a, b: F.linear(x, torch.cat([a, b])), [SQUARE, SQUARE], ["cat", "cat"]),
    "cast": (lambda x, w: F.linear(x.bfloat16(), w.bfloat16()), [SQUARE], ["bfloat16"]),
    "rows": (lambda x, w: F.linear(x, F.embedding(torch.arange(4), w)), [SQUARE], ["embedding"]),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), [(8, N, N)], ["a 3-D weight"]),
    "einsum of three": (lambda x, a, b: torch.einsum("bi,ij,jk->bk", x, a, b), [SQUARE, SQUARE], ["einsum"] * 2),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), [SQUARE], ["tensordot"]),
    "inner": (lambda x, w: torch.inner(x, w), [SQUARE], ["inner"]),
    "multi_dot": (lambda x, a, b: torch.linalg.multi_dot([x, a, b]), [SQUARE, SQUARE], ["linalg_multi_dot"] * 2),
    "baddbmm": (lambda x, w: torch.baddbmm(x[None], x[None], w), [(1, N, N)], ["a 3-D weight"]),
    "mv": (lambda x, w: torch.mv(w, x[0]), [SQUARE], ["mv"]),
    "addmm_": (lambda x, w: x.clone().addmm_(x, w), [SQUARE], ["addmm_"]),
    "lstm": (_lstm, [(4 * N, N), (4 * N, N)], ["lstm", "lstm"]),
    "checkpoint": (
        lambda x, w: checkpoint(lambda y: F.linear(y, w), x, use_reentrant=False),
        [SQUARE],
        ["tag_activation_checkpoint"],
    ),
    "key": (
        lambda x, k, b: F.scaled_dot_product_attention(x[None], k[None], x[None], attn_mask=b),
        [(4, N), (4, 4)],
        ["getitem", ""],
    ),
    "learned queries": (lambda x, q, w: F.linear(q.expand(2, 4, N), w), [(4, N), SQUARE], ["", None]),
    "no matmul": (
        lambda x, a, b: F.layer_norm(F.embedding(torch.arange(4), a) + x + b, (4, N), b),
        [SQUARE, (4, N)],
        ["", ""],
    ),
    "convolution": (lambda x, w: F.conv1d(x.T[None], w), [(N, N, 1)], [""]),
    "resampled": (lambda x, w: x + F.interpolate(w, size=(4, N), mode="bilinear")[0, 0], [(1, 1, 8, 8)], [""]),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_matmuls_read_is_named(name, captured):
    function, shapes, expected = HIDDEN[name]
    model, x = Form(function, *shapes), torch.randn(4, N)
    with torch.no_grad():
        actual = torch.compile(model, backend="fp6", options={"include_float32": True, "min_features": 1})(x)
        if None not in expected:
            torch.testing.assert_close(actual, model(x), rtol=2e-2, atol=2e-2)
    reasons = {name: linear.reason for name, linear in _lines().items()}
    words = [reason and (reason if " " in reason else f"multiplied only through {reason}") for reason in expected]
    assert reasons == {f"w{i}": reason for i, reason in enumerate(words) if reason != ""}


def test_what_is_run_to_look_at_it_stays_as_it_was(captured):
    """Sizes stay symbolic, though a function has been run on them."""
    model = Form(lambda x, w: F.bilinear(x, x, w), (8, N, N)).half()
    compiled = torch.compile(model, backend="fp6", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(4, N).half())
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert compiled(torch.randn(6, N).half()).shape == (6, 8)


def test_what_cannot_be_watched_is_named():
    def condition(x, w):
        return torch.cond(x.sum() > 0, lambda x: x @ w, lambda x: x + 1, (x,))

    with torch.no_grad():
        torch.compile(Form(condition, SQUARE).half(), backend="fp6")(torch.randn(4, N).half())
    assert _lines()["w0"].reason == "multiplied only through cond"


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=["weight_norm", "spectral_norm"]
)
def test_parametrized_weights_are_named(wrap, captured):
    model, x = wrap(nn.Linear(N, N)).half().eval(), torch.randn(4, N).half()
    with torch.no_grad():
        torch.compile(model, backend="fp6")(x)
        names = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        assert set(_lines()) == names
        torch._dynamo.reset()
        with pytest.raises(Exception, match="fp6: strict: cannot quantize parametrizations.weight.original"):
            torch.compile(model, backend="fp6", options={"strict": True, "min_features": 1})(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, N), (2, 3, N), (N,)], ids=str)
def test_an_x_of_another_dtype_is_refused_as_in_eager_code(shape, bias, captured):
    model, x = nn.Linear(N, N, bias=bias).bfloat16(), torch.randn(shape).half()
    compiled = torch.compile(model, backend="fp6")
    with torch.no_grad():
        for call in (model, compiled, compiled):
            with pytest.raises(RuntimeError, match="same dtype, but got.*Half.*BFloat16"):
                call(x)
        assert compiled(x.bfloat16()).dtype == torch.bfloat16


def test_a_packed_weight_refuses_another_dtype_compiled():
    model = nn.Linear(N, N).bfloat16()
    fp6_compile.quantize_(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="x is torch.float16 and the packed weight torch.bfloat16"):
        torch.compile(model, backend="fp6")(torch.randn(2, N).half())


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_a_weight_that_is_negated_in_memory(scale):
    negated = torch._neg_view(torch.randn(N, N))  # as the imaginary part of a conjugate is
    packed = fp6_compile.PackedTensor.quantize(negated, scale=scale)
    assert torch.equal(packed, fp6_compile.PackedTensor.quantize(negated.resolve_neg(), scale=scale))


def test_a_parameter_that_is_negated_in_memory(captured):
    model, x = nn.Linear(N, N, bias=False), torch.randn(2, N)
    model.weight = nn.Parameter(torch._neg_view(torch.randn(N, N)))
    with torch.no_grad():
        actual = torch.compile(model, backend="fp6", options={"include_float32": True, "strict": True})(x)
        close(actual, dequantized_(model, ["weight"])(x), roundings=32)


def test_the_default_dtype_and_device_do_not_matter():
    """Scales are float32 and planes on the CPU, where the C++ kernel writes them."""
    weight = torch.randn(N, N).half()
    expected = fp6_compile.PackedTensor.quantize(weight)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            assert torch.equal(fp6_compile.PackedTensor.quantize(weight), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_functional_call_inside(captured):
    """New tensors in the place of parameters are named, and every call computes with its own."""
    model, x = nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N)).half(), torch.randn(2, N).half()
    compiled = torch.compile(lambda given, x: torch.func.functional_call(model, given, (x,)), backend="fp6")
    with torch.no_grad():
        for _ in range(3):
            given = {name: torch.randn_like(parameter) / 16 for name, parameter in model.named_parameters()}
            torch.testing.assert_close(compiled(given, x), torch.func.functional_call(model, given, (x,)))
    assert {name: linear.reason for name, linear in _lines().items()} == dict.fromkeys(
        ["0", "2"], "not an nn.Parameter"
    )


def test_functional_call_of_a_compiled_model(captured):
    model, x = nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N)).half(), torch.randn(2, N).half()
    compiled = torch.compile(model, backend="fp6")
    with torch.no_grad():
        taken = compiled(x)
        for _ in range(2):
            given = {name: torch.randn_like(parameter) / 16 for name, parameter in model.named_parameters()}
            expected = torch.func.functional_call(model, given, (x,))
            prefixed = {f"_orig_mod.{name}": value for name, value in given.items()}
            torch.testing.assert_close(torch.func.functional_call(compiled, prefixed, (x,)), expected)
        torch.testing.assert_close(compiled(x), taken, rtol=0, atol=0)
    reasons = [linear.reason for report in fp6_compile.reports() for linear in report.linears]
    assert reasons == [None, None, "not an nn.Parameter", "not an nn.Parameter"]
