"""LoRA in a live loop: an adapter beside six-bit weights, swapped and fused between tokens, without a recompile."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fp6_compile
from benchmarks.decode.loop import Sampling, State, make_prefill, make_step, run
from benchmarks.decode.model import lora
from benchmarks.decode.model.weights import build
from examples.code_lm.model import KVCache, ModelConfig
from fp6_compile import PackedTensor
from tests.support.references import close

SMALL = ModelConfig(vocab=320, dim=128, layers=1, heads=4, kv_heads=2, hidden=384)
PROMPT, TOKENS = 4, 6


class Loop:
    """A decode loop of a model, its step compiled by backend="fp6" unless it is eager."""

    def __init__(self, model, backend="fp6"):
        self.model, cache = model, KVCache.allocate(SMALL, 1, 16, dtype=torch.bfloat16)
        self.state = State(1, 17, Sampling(), "cpu")

        def forward(tokens, positions):
            return model(tokens, positions, cache)

        self.prefill, self.step = make_prefill(forward, self.state), make_step(forward, self.state)
        if backend is not None:
            self.step = torch.compile(self.step, backend=backend, fullgraph=True)

    def tokens(self, between=lambda: None):
        """Tokens of a decode; `between` is called after the third."""
        run(lambda: self.prefill(torch.arange(PROMPT)[None]), self.step, 3, "cpu")
        between()
        run(lambda: None, self.step, TOKENS - 3, "cpu")
        return self.state.chosen[0, PROMPT : PROMPT + TOKENS + 1].tolist()


def _with_adapter(kind):
    model = build(SMALL, kind, dtype=torch.bfloat16, device="cpu")
    return model, lora.attach(model, 8)


def _packed(model):
    """The same model, its linears packed as they are now."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module.weight, PackedTensor):
            module.weight = nn.Parameter(PackedTensor.quantize(module.weight))
    return model


def test_an_adapter_is_base_plus_b_a_x():
    layer = lora.LoRA(nn.Linear(128, 256, bias=False), 4).requires_grad_(False)
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), layer.base_layer(x))
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.normal_()
    expected = x.double() @ (layer.base_layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double()).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["float", "fp6"])
def test_swap_and_fuse_between_tokens(kind, captured, caplog):
    """16-bit weights that the backend packs, and weights that were packed before: the tokens are the eager model's."""
    model, adapters = _with_adapter(kind)
    loop = Loop(model)
    first, second = (lora.random_adapter(adapters, model, seed) for seed in (1, 2))
    lora.swap(model, first)
    before = loop.tokens()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        swapped = loop.tokens(lambda: lora.swap(model, second))
        assert counters["fp6"]["weights_refreshed"] == 0
        assert fp6_compile.last_refresh() is None
        assert swapped[:4] == before[:4]
        assert swapped != before

        lora.swap(model, first)
        with caplog.at_level(logging.INFO, "fp6_compile"):
            fused = loop.tokens(lambda: [lora.fuse(layer) for layer in adapters])
    assert fused[:4] == before[:4]
    assert not any(layer.lora_B.any() for layer in adapters)
    if kind == "float":  # the backend has packed them, and says what was packed anew
        refresh = fp6_compile.last_refresh()
        assert counters["fp6"]["weights_refreshed"] == len(adapters) == len(refresh.seconds) == 4
        assert any(name.endswith("layers.0.attention.o.base_layer") for name in refresh.seconds)
        assert all(seconds > 0 for seconds in refresh.seconds.values())
        assert str(refresh) in caplog.text
        assert "and 1 more in " in str(refresh)
    assert loop.tokens() == Loop(_packed(model), backend=None).tokens()


def test_fusing_into_a_packed_weight_rounds_once_more():
    base = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    base.weight = nn.Parameter(PackedTensor.quantize(torch.randn(128, 256).bfloat16(), group_size=64))
    layer = lora.LoRA(base, 4)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    weight = base.weight
    kept, wide = weight.clone(), weight.dequantize(torch.float32) + layer.lora_B.float() @ layer.lora_A.float()
    lora.fuse(layer)
    assert base.weight is weight
    assert torch.equal(weight, PackedTensor.quantize(wide, group_size=64, dtype=torch.bfloat16))
    weight.copy_(kept)  # the way back, exactly
    assert torch.equal(weight, kept)


def test_what_a_packed_weight_says_to_an_addition_in_place():
    weight = PackedTensor.quantize(torch.randn(128, 128).half())
    with pytest.raises(NotImplementedError, match=r"cannot add to PackedTensor.*, dequantize the model"):
        weight += 1


def test_swap_refuses_names_that_are_not_there_and_changes_nothing():
    model, adapters = _with_adapter("fp6")
    adapter = lora.random_adapter(adapters, model, 1)
    with pytest.raises(KeyError, match="nowhere"):
        lora.swap(model, {**adapter, "nowhere": torch.zeros(1)})
    assert not any(layer.lora_A.any() for layer in adapters)


class Projections(nn.Module):
    """Two linears of one input, with an adapter each, as PEFT wraps them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = (lora.LoRA(nn.Linear(256, 128, bias=False), 4) for _ in range(2))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x)


def test_linears_inside_adapters_are_merged(captured):
    """They are linears of two modules, whose parents are the linears of one."""
    model, x = Projections().half().requires_grad_(False), torch.randn(3, 256).half()
    for parameter in (model.q_proj.lora_A, model.q_proj.lora_B):
        parameter.normal_()
    compiled = torch.compile(model, backend="fp6")
    q, k = compiled(x)
    assert captured.targets().count("fp6.mm") == 1
    assert counters["fp6"]["merged"] == 1
    torch._dynamo.reset()
    alone = torch.compile(model.q_proj, backend="fp6")(x)
    close(q, alone)
    assert k.shape == (3, 128)
