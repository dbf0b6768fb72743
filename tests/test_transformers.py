"""Models that nobody here wrote: small random configurations of transformers models."""

import os

import pytest
import torch
from torch._dynamo.utils import counters

import fp6_compile
from tests.support.references import dequantized_, quantized_names, untie

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

VOCABULARY = 512
# A layer is enough: all are alike.
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False))


def _qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True))


def _gpt2():
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=128, **ids)
    return transformers.GPT2LMHeadModel(config)


def _bert():
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=VOCABULARY))


def _mixtral():
    # All experts for every token: with fewer, a rounding can change which ones are chosen, and with it the output.
    experts = {"num_local_experts": 4, "num_experts_per_tok": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, **experts))


def _phi3():
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA, **ids))


# name: (model, its linears, how many of them are taken, launches that merging saves)
MODELS = {
    "llama": (_llama, 8, 8, 3),
    "qwen2": (_qwen2, 8, 8, 3),  # q, k and v have biases
    "gpt2": (_gpt2, 5, 5, 0),
    "bert": (_bert, 7, 7, 2),
    "mixtral": (_mixtral, 8, 5, 2),
    "phi3": (_phi3, 5, 5, 0),
}


def _run(function, tokens):
    """The first output, and how often Dynamo broke the graph."""
    counters.clear()
    with torch.no_grad():
        out = function(tokens)[0]
    return out, sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("bert", "phi3") else []) for name in MODELS]
)
def test_every_eligible_linear_is_quantized(name, captured):
    """And the output is that of the same model with dequantized weights; a tied embedding stays float."""
    make, linears, taken, merged = MODELS[name]
    model = make().to(torch.bfloat16).eval()
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    actual, breaks = _run(torch.compile(model, backend="fp6"), tokens)
    report = fp6_compile.last_report()
    assert (len(report.linears), len(report.quantized)) == (linears, taken), str(report)
    assert (counters["fp6"]["mm"], counters["fp6"]["merged"]) == (taken, merged)
    assert captured.targets().count("fp6.mm") == taken - merged
    assert all(
        linear.reason in ("a 3-D weight", "fewer than 128 inputs or outputs (min_features)")
        for linear in report.skipped
    )
    torch._dynamo.reset()
    _, eager_breaks = _run(torch.compile(model, backend="eager"), tokens)
    assert breaks == eager_breaks
    untie(model)
    expected, _ = _run(dequantized_(model, list(quantized_names(model, report))), tokens)
    # The two round sums to bfloat16 in places of their own (attention, norms), layer after layer.
    error = (actual - expected).float().norm() / expected.float().norm()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps, error


@pytest.mark.slow
def test_llama_through_inductor():
    """With real code generation, beside backend="inductor" of the model with dequantized weights."""
    model = _llama().to(torch.bfloat16).eval()
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    actual, _ = _run(torch.compile(model, backend="fp6"), tokens)
    names = list(quantized_names(model, fp6_compile.last_report()))
    torch._dynamo.reset()
    expected, _ = _run(torch.compile(dequantized_(model, names), backend="inductor"), tokens)
    assert (actual - expected).float().norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.float().norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_dynamic_batch_and_length(name, captured):
    """Phi-3's guards are the ones that fail if the packed inputs were to have symbolic sizes."""
    make, _, taken, _ = MODELS[name]
    compiled = torch.compile(make().to(torch.float16).eval(), backend="fp6", dynamic=True)
    with torch.no_grad():
        compiled(torch.randint(0, VOCABULARY, (2, 8)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(torch.randint(0, VOCABULARY, (3, 5))).logits
    assert out.shape == (3, 5, VOCABULARY)
    assert counters["fp6"]["weights_packed"] == taken


@pytest.mark.slow
def test_static_cache_decode_does_not_recompile():
    """Prefill, then 64 single-token steps through a static KV cache: one graph each, planes packed once."""
    model = _llama().to(torch.float16).eval()
    compiled = torch.compile(model, backend="fp6")
    cache = transformers.StaticCache(config=model.config, max_cache_len=96)
    with torch.no_grad():
        position = torch.arange(8)
        step = {"past_key_values": cache, "use_cache": True}
        compiled(torch.randint(0, VOCABULARY, (1, 8)), cache_position=position, position_ids=position[None], **step)
        for i in range(8, 72):
            # The first decode step compiles the decode graph, the second one may find strides settled.
            with torch._dynamo.config.patch(error_on_recompile=i > 9):
                position = torch.tensor([i])
                token = torch.randint(0, VOCABULARY, (1, 1))
                compiled(token, cache_position=position, position_ids=position[None], **step)
    assert counters["fp6"]["weights_packed"] == 8
