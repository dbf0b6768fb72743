"""One Llama decoder layer at M = 1: how many kernels the code generated for a GPU launches, and what each of them is for."""

import math
import re

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import FileCheck

from examples.code_lm.model import Block, ModelConfig, rope_angles
from fp6_compile.explanation.trace.launches import launches
from fp6_compile.kernels.selection import selftest
from tests.deviceless.codegen import generate_modules
from tests.deviceless.interpret import run_interpreted
from tests.support.references import dequantized_

# As wide as it must be for K to be split on an H200, and no wider.
CONFIG = ModelConfig(dim=1024, heads=8, kv_heads=2, hidden=2048)
LENGTH = 64
# Folding would compute constants on the device.
INDUCTOR = {"joint_graph_constant_folding": False}


class Step(nn.Module):
    """A decoder layer, and what all layers of a model share: the mask and the rotary angles of this position."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(CONFIG)

    def forward(self, x, positions, keys, values):
        rope = rope_angles(positions, CONFIG.head_dim, CONFIG.rope_base)
        mask = torch.arange(LENGTH, device=x.device) <= positions[:, None]
        return self.block(x, positions, rope, mask, (keys, values))


class Rotated(nn.Module):
    """A product of which two kernels of different sizes read."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(256, 384, bias=False)

    def forward(self, x):
        q, k = self.fc(x).split([256, 128], -1)
        return q.cos(), k.sin()


@pytest.fixture(autouse=True)
def wgmma(monkeypatch):
    """The self-test's answer: it cannot run on a device that is only fake."""
    monkeypatch.setattr(selftest, "passes", lambda *problem, **_: False)


def _inputs(config=CONFIG):
    cache = torch.randn(2, 1, config.kv_heads, LENGTH, config.head_dim).half()
    return [torch.randn(1, 1, config.dim).half(), torch.tensor([5]), *cache]


def _no_copy_of_a_weight(module, smallest):
    """No input and no buffer is as large as the smallest weight, or it is the planes."""
    floats = [t for t in module.inputs if isinstance(t, torch.Tensor) and t.dtype == torch.float16]
    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", module.code)
    sizes = [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]
    assert sizes, module.code
    assert max([*sizes, *(t.numel() for t in floats)]) < smallest


@pytest.mark.slow
def test_ten_launches():
    """Nine of a layer, attention among them, and one of the step; the numbers are those of the dequantized weights."""
    torch.manual_seed(0)
    model, inputs = Step(), _inputs()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model = model.half().requires_grad_(False)
    (module,) = generate_modules(model, inputs, backend="fp6", dynamic=False, config=INDUCTOR)
    names = launches(module.code)
    assert len(names) == 10, names
    norm, shared, qkv, rotated, attention, o, norm2, gate_up, product, down = names
    text = module.kernels
    assert attention == "torch.ops.aten._scaled_dot_product_efficient_attention.default"
    for matmul in (qkv, o, gate_up, down):
        FileCheck().check("acc = accumulate(").run(text[matmul])
    FileCheck().check("rsqrt").run(text[norm])
    FileCheck().check("tl.store(out_ptr0").check("tl.store(out_ptr1").run(text[shared])  # locks and mask
    # q, k and the cache: three grids in one.
    FileCheck().check("cos(").check("sin(").check("elif pid").check("sin(").check("elif pid").run(text[rotated])
    # o's sum is added up by the norm that reads it, with the residual; the others by their last program.
    FileCheck().check_not("reduce(").run(text[o])
    parts = int(re.search(r"SPLIT_K : tl.constexpr = (\d+)", text[o])[1])
    assert parts > 1
    assert len(set(re.findall(r"tl.load\(\w+ \+ \((?:(\d+) \+ )?r0_0\)", text[norm2]))) >= parts
    FileCheck().check("rsqrt").run(text[norm2])
    FileCheck().check("exp(").check("tl.store(out_ptr0").run(text[product])
    FileCheck().check("reduce(").check("tl.load(in_ptr").check("tl.store(out_ptr").run(text[down])  # residual
    _no_copy_of_a_weight(module, CONFIG.kv_heads * CONFIG.head_dim * CONFIG.dim)
    code = module.code.replace("USE_ASM : tl.constexpr = True", "USE_ASM : tl.constexpr = False")
    (actual,) = run_interpreted(code, module.inputs, ["tests.deviceless.attention"])
    dequantized_(model, [name for name, parameter in model.named_parameters() if parameter.dim() == 2])
    expected = model.float()(*(t.float() if t.is_floating_point() else t for t in inputs))
    # Ten roundings to float16 on the way, each of a value of the output's size or below.
    assert (actual - expected).abs().max() <= 5 * torch.finfo(torch.float16).eps * expected.abs().max()


def test_transformers_layer():
    """Ten launches of the layer: as above, and one that repeats keys and values for the heads that share them.

    All in one CUDA graph.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, attn_implementation="sdpa")

    class Layer(LlamaDecoderLayer):
        """A layer with its static cache as an input."""

        def forward(self, x, position, keys, values, mask, cos, sin):
            layer = transformers.cache_utils.StaticLayer(LENGTH)
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.cumulative_length, layer.device = position, keys.device
            cache = transformers.Cache(layers=[layer])
            return super().forward(x, mask, position_embeddings=(cos, sin), past_key_values=cache)

    mask = torch.zeros(1, 1, 1, LENGTH).half()
    model, angles = Layer(config, 0).half().requires_grad_(False), torch.randn(2, 1, 1, 128).half()
    inputs = [*_inputs(), mask, *angles]
    for tensor in inputs[1:4]:  # position and cache, as StaticCache does
        torch._dynamo.mark_static_address(tensor)
    (module,) = generate_modules(model, inputs, backend="fp6", dynamic=False, mode="reduce-overhead", config=INDUCTOR)
    # Nothing that Inductor sees when it compiles keeps the step from being one CUDA graph.
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert module.code.count("def partition_") == 1
    norm, locks, *rest = launches(module.code)
    assert len([norm, *rest]) == 10, module.code
    FileCheck().check("4096").check("tl.store(out_ptr0").run(module.kernels[locks])  # once a graph, not once a layer
    assert sum("accumulate(" in text for text in module.kernels.values()) == 4
    _no_copy_of_a_weight(module, 256 * 1024)


def test_combination_can_be_turned_off():
    """The user's settings win: then rotary embeddings and the cache's writes are three launches."""
    model, x = Rotated().half().requires_grad_(False), torch.randn(1, 256).half()
    counts = []
    for inductor in ({}, {"combo_kernels": False}):
        (module,) = generate_modules(model, [x], backend="fp6", dynamic=False, options={"inductor": inductor})
        counts.append(len(launches(module.code)))
    assert counts == [2, 3]
