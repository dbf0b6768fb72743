"""transformers' `generate()` with a static cache and this backend: small random models of the families people use.

`generate` runs the prompt (and an encoder) as it is, and compiles the steps of one token. So the reference is the same model
whose steps are those of a twin with dequantized weights.
"""

import copy
import os

import pytest
import torch
from torch._dynamo.utils import counters

import fp6_compile
from tests.support.references import dequantized_, quantized_names, untie

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

VOCABULARY, STEPS = 256, 64
# A layer is enough: all are alike. No end of text, so that all tokens are made.
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {"hidden_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 512, **IDS}
HEADS = {"intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
ALL_HEADS = {"intermediate_size": 256, "num_attention_heads": 4}


def _bart():
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _SIDE.items()}
    config = transformers.BartConfig(
        d_model=128, max_position_embeddings=512, decoder_start_token_id=1, forced_eos_token_id=None, **IDS, **sides
    )
    return transformers.BartForConditionalGeneration(config)


_SIDE = {"layers": 1, "ffn_dim": 256, "attention_heads": 4}


def _gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=128, n_layer=1, n_head=4, n_positions=512, **IDS)
    )


def _opt():
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(ffn_dim=256, num_attention_heads=4, word_embed_proj_dim=128, **SIZES)
    )


def _of(family, **sizes):
    config = getattr(transformers, f"{family}Config")(**SIZES, **sizes)
    return lambda: getattr(transformers, f"{family}ForCausalLM")(config)


# name: (model, linears of a step, launches that merging saves)
MODELS = {
    "llama": (_of("Llama", **HEADS), 8, 3),
    "qwen3": (_of("Qwen3", **HEADS), 8, 3),
    "mistral": (_of("Mistral", **HEADS, sliding_window=None), 8, 3),
    "gemma": (_of("Gemma", **HEADS, tie_word_embeddings=False), 8, 3),
    "phi": (_of("Phi", **ALL_HEADS), 7, 2),
    "gpt2": (_gpt2, 5, 0),
    "opt": (_opt, 7, 2),
    "bart": (_bart, 9, 2),  # keys and values of the encoder's output are in the cache
}


class Graphs:
    """A streamer that notes how many graphs there are when each token comes."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, tokens):
        self.seen.append(counters["stats"]["unique_graphs"])

    def end(self):
        """Nothing is left over."""


def _generate(model, tokens, steps=STEPS, **how):
    how = {"max_new_tokens": steps, "min_new_tokens": steps, "max_cache_len": 8 + STEPS, **how}
    return model.generate(tokens, do_sample=False, cache_implementation="static", **how)


def _compile_config():
    config = transformers.CompileConfig(backend="fp6", mode=None, options={"include_float32": True})
    config._compile_all_devices = True  # generate() compiles only on a GPU, unless its own tests ask
    return config


def _random(make):
    """Weights so large that one token is far likelier than the next: a tie would be decided by rounding."""
    model = make().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def _reference(model, names):
    """`model`, with the steps of a twin whose weights are dequantized."""
    twin, model = copy.deepcopy(model), copy.deepcopy(model)
    untie(twin)
    dequantized_(twin, names)
    model.get_compiled_call = lambda config: twin.__call__
    return model


def _cuda_graph_would_copy(captured):
    """Inputs that the step writes and that are not known to stay where they are: for those CUDA graphs are given up."""
    graph, static = captured.graphs[-1], set(captured.static_inputs[-1])
    inputs = graph.find_nodes(op="placeholder")
    written = {node.args[0] for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)}
    assert written & set(inputs), "the cache is written"
    return [node.name for i, node in enumerate(inputs) if node in written and i not in static]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("llama", "bart") else pytest.mark.slow) for name in MODELS]
)
def test_tokens(name, captured):
    """64 tokens: those of the dequantized weights, all linears taken, one graph, none for a second prompt and cache."""
    make, linears, merged = MODELS[name]
    model, tokens, graphs = _random(make), torch.randint(3, VOCABULARY, (1, 8)), Graphs()
    actual = _generate(model, tokens, compile_config=_compile_config(), streamer=graphs)
    report = fp6_compile.last_report()
    assert len(report.quantized) == len(report.linears) == linears, str(report)
    assert counters["fp6"]["merged"] == merged
    assert not counters["graph_break"]
    assert set(graphs.seen[2:]) == {1}  # the first two are the prompt's
    assert not _cuda_graph_would_copy(captured)
    names = list(quantized_names(model, report))
    with torch._dynamo.config.patch(error_on_recompile=True):
        _generate(model, tokens.flip(1), 3, compile_config=_compile_config())
    expected = _generate(_reference(model, names), tokens, compile_config=_compile_config())
    assert actual.tolist() == expected.tolist()
    assert len(set(actual[0].tolist())) > 8, "a model that repeats itself tests little"


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_packed_model(name, captured):
    """After quantize_ the prompt and the encoder run in six bits, too; what is tied to an embedding is taken by the step."""
    make, linears, merged = MODELS[name]
    model, tokens = _random(make), torch.randint(3, VOCABULARY, (1, 8))
    plain, packed = copy.deepcopy(model), fp6_compile.quantize_(model, include_float32=True)
    actual = _generate(model, tokens, 32, compile_config=_compile_config())
    report = fp6_compile.last_report()
    assert len(report.quantized) == len(report.linears) == linears, str(report)
    assert counters["fp6"]["merged"] == merged
    names = {linear.name for linear in packed.quantized}
    dequantized_(plain, [f"{name}.weight" for name in names])
    step = [f"{linear.name}.weight" for linear in report.quantized if linear.name not in names]
    expected = _generate(_reference(plain, step), tokens, 32, compile_config=_compile_config())
    assert actual.tolist() == expected.tolist()


def test_encoder(captured):
    """An encoder is compiled by itself: every length of text is one graph."""
    model = _random(_bart)
    encoder = model.get_encoder()
    encoder.compile(backend="fp6", dynamic=True, options={"include_float32": True})
    for length in (8, 13):
        tokens = torch.randint(3, VOCABULARY, (1, length))
        actual = encoder(tokens).last_hidden_state
    report = fp6_compile.last_report()
    assert len(report.quantized) == len(report.linears) == 6, str(report)
    assert len(captured.graphs) == 1
    twin = copy.deepcopy(model).get_encoder()
    twin._compiled_call_impl = None
    dequantized_(twin, [f"{linear.name}.weight" for linear in report.quantized])
    torch.testing.assert_close(actual, twin(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)
