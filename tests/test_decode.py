"""The decode benchmark: what is packed, what is read, that more tokens in a graph are the same tokens, and the command."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.decode import __main__ as command
from benchmarks.decode import breakdown, measure
from benchmarks.decode.loop import Sampling, State, make_prefill, make_step, run
from benchmarks.decode.measure import Bench, Settings
from benchmarks.decode.model import llama, local
from benchmarks.decode.model.llama import SIZES, Llama, parameter_count
from benchmarks.decode.model.weights import build, weight_bytes
from benchmarks.decode.report import draw, summary
from benchmarks.decode.worker import Worker
from benchmarks.system import memory
from examples.code_lm.model import KVCache, ModelConfig
from fp6_compile import PackedTensor

# Every linear has a shape of its own, as in the models.
SMALL = ModelConfig(vocab=320, dim=128, layers=1, heads=4, kv_heads=2, hidden=384)
PROMPT, TOKENS = 5, 16


def _build(kind, **how):
    return build(SMALL, kind, dtype=torch.bfloat16, device="cpu", **how)


def _decode(model, sampling, steps, compile=lambda step: step):
    cache = KVCache.allocate(SMALL, 2, PROMPT + TOKENS, dtype=torch.bfloat16)
    state = State(2, cache.length + 1, sampling, "cpu")

    def forward(tokens, positions):
        return model(tokens, positions, cache)

    prompt = torch.arange(2 * PROMPT).view(2, -1)
    prefill, step = make_prefill(forward, state), compile(make_step(forward, state, steps))
    run(lambda: prefill(prompt), step, TOKENS // steps, "cpu")
    assert state.position == PROMPT + TOKENS
    assert all(keys.abs().amax(-1).gt(0).all() for keys in cache.keys)
    return state.chosen[:, PROMPT:]


def test_sizes_are_those_of_the_models():
    billions = {size: round(parameter_count(config) / 1e9, 2) for size, config in SIZES.items()}
    assert billions == {"tiny": 0.0, "1b": 1.1, "8b": 8.03, "70b": 70.55}


def test_a_packed_model_has_no_float_linear_and_the_same_weights():
    plain, packed = _build("float"), _build("fp6", head="float")
    weight = packed.layers[0].attention.qkv.weight
    assert isinstance(weight, PackedTensor)
    assert isinstance(weight, torch.nn.Parameter)
    assert torch.equal(weight.dequantize(), plain.layers[0].attention.qkv.weight)
    assert weight.dequantize(torch.float32).std() == pytest.approx(0.5 / 128**0.5, rel=0.02)
    assert not isinstance(packed.head.weight, PackedTensor)
    assert torch.equal(packed.head.weight, plain.head.weight)
    assert torch.equal(packed.embedding.weight, plain.embedding.weight)


def test_weight_bytes_counts_what_is_stored_and_an_embedding_as_not_read():
    total, read = weight_bytes(_build("float"))
    assert total - read == 2 * SMALL.vocab * SMALL.dim
    assert total == 2 * parameter_count(SMALL)
    linears = [m.weight for m in _build("fp6").modules() if isinstance(m, torch.nn.Linear)]
    norms = 2 * SMALL.dim * (2 * SMALL.layers + 1)
    assert weight_bytes(_build("fp6"))[1] == norms + sum(weight.packed_bytes for weight in linears)


def test_attention_is_that_of_the_uncached_model():
    """Prefill and steps choose what one pass over all tokens, with keys and values repeated for every head, chooses."""
    from torch.nn import functional as F

    from examples.code_lm.model import rope_angles, rotate

    model = _build("float").float()
    attention, x = model.layers[0].attention, torch.randn(1, 7, SMALL.dim)
    cache = KVCache.allocate(SMALL, 1, 7)
    positions = torch.arange(7)
    rope = rope_angles(positions, SMALL.head_dim, SMALL.rope_base)
    mask = (positions <= positions[:, None]).repeat(2, 1)
    actual = attention(x, positions, rope, mask, (cache.keys[0], cache.values[0]))
    q, k, v = attention.qkv(x).unflatten(-1, (-1, SMALL.head_dim)).transpose(1, 2).split([4, 2, 2], 1)
    q, k = rotate(q, rope), rotate(k, rope)
    y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)
    torch.testing.assert_close(actual, attention.o(y.transpose(1, 2).flatten(2)))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20)], ids=["greedy", "sampled"])
def test_eight_tokens_in_a_graph_are_the_same_tokens(sampling, captured):
    """One compiled graph of eight chooses what eight eager steps choose."""
    model = _build("fp6")
    eager = _decode(model, sampling, 1)
    tokens = _decode(model, sampling, 8, lambda step: torch.compile(step, backend="fp6", fullgraph=True))
    assert torch.equal(tokens, eager)
    assert len(eager.unique()) > 4
    assert len(captured.graphs) == 1
    assert captured.targets().count("fp6.mm") == (4 * SMALL.layers + 1) * 8


def test_sampling_draws_from_the_likeliest_in_their_proportions():
    state = State(4096, 2, Sampling(temperature=0.5, top_k=2), "cpu")
    logits = torch.tensor([0.0, 1.0, 0.5, -9.0]).expand(4096, 4)
    chosen = state.choose(logits, torch.tensor([1]))
    assert set(chosen.unique().tolist()) == {1, 2}
    likely = torch.tensor([1.0, 0.5]).div(0.5).softmax(0)[0]
    assert (chosen == 1).float().mean() == pytest.approx(float(likely), abs=4 * (0.25 / 4096) ** 0.5)


def test_summary_counts_weights_and_cache():
    known = {"read_bytes": 3e9, "kv_cache_bytes": 1e9}
    result = summary(known, [0.4, 0.5, 0.6], [0.2], batch=2, bandwidth=20.0)
    assert (result["ms_p50"], result["tokens_per_s"], result["gb_s"]) == (500, 4, 8)
    assert (result["share_of_bandwidth"], result["prefill_ms"]) == (0.4, 200)


# where the time goes


def _event(name, shapes, us=0.0, kernels=(), parent=None, device=DeviceType.CPU):
    kernels = [SimpleNamespace(duration=duration) for duration in kernels]
    own = {"self_cpu_time_total": us, "kernels": kernels, "cpu_parent": parent, "device_type": device}
    return SimpleNamespace(name=name, input_shapes=shapes, **own)


def test_roles_of_kernels_by_the_shapes_of_their_inputs():
    """By planes, float weights either way round, the cache, an operator above, or x and scale alone."""
    packed, cache = _build("fp6"), KVCache.allocate(SMALL, 1, 9)
    known = breakdown.roles(packed, cache.keys)
    planes = [list(plane.shape) for plane in packed.layers[0].feed_forward.down.weight.planes]
    mm = _event("fp6::mm", [[1, 128], [], [], [1, 768]], us=7000.0)
    events = [
        _event("triton_tem_fused_mm_3", [[1, 384], *planes, [1, 128]], kernels=[2000.0]),
        _event("aten::mm", [[1, 128], [128, 256], [1, 256]], kernels=[500.0, 500.0]),
        _event("triton_poi_fused_2", [[1, 128]], kernels=[250.0]),
        _event("aten::_scaled_dot_product_efficient_attention", [[2, 1, 2, 32], [2, 1, 9, 32]], kernels=[100.0]),
        _event("triton_poi_fused_3", [[1, 256], list(cache.keys[0].shape)], kernels=[25.0]),
        _event("cudaLaunchKernel", [], us=9000.0),
        _event("kernel", [], device=DeviceType.CUDA),
    ]
    assert breakdown.split(events, known, cuda=True) == {"down": 2.0, "qkv": 1.0, "rest": 0.25, "attention": 0.125}
    cpu = [mm, _event("inner", [], us=1000.0, parent=mm), _event("aten::copy_", [[3]], us=500.0)]
    assert breakdown.split(cpu, known, cuda=False) == {"gate_up": 8.0, "rest": 0.5}


def test_kernels_are_counted_without_copies_and_annotations():
    events = [
        _event(name, [], device=DeviceType.CUDA) for name in ("gemm", "triton_poi", "Memcpy DtoD", "Memset (Device)")
    ]
    events += [_event("aten::mm", []), SimpleNamespace(name="Torch-Compiled Region", device_type=DeviceType.CUDA)]
    events[-1].is_user_annotation = True
    assert breakdown.count_kernels(events) == 2


# processes and the command


class InProcess(Bench):
    """A Worker without its process."""

    def __init__(self, settings, say):
        super().__init__(measure.Settings(**{**vars(settings), "cache": None}))

    def close(self):
        pass


@pytest.fixture
def small(monkeypatch):
    for module in (llama, measure, command):
        monkeypatch.setattr(module, "SIZES", {**SIZES, "tiny": SMALL})
    monkeypatch.setattr(command, "Worker", InProcess)
    monkeypatch.setattr(command, "read_bandwidth", lambda device: 10.0)


@pytest.mark.slow
def test_the_command_ends_with_one_line_of_json(small, captured, capfd, tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    short = ["--tokens", "8", "--steps-per-graph", "2", "--rounds", "1", "--prompt", "3", "--lora", "4"]
    files = ["--out", str(out), "--plot", str(plot), "--once", "--backends", "eager", "fp6"]
    command.main(["--size", "tiny", "--device", "cpu", "--threads", "1", "--batch", "1", "2", *short, *files])
    printed = capfd.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document == json.loads(out.read_text())
    for batch in ("1", "2"):
        results = document["results"][batch]
        assert results.keys() == {"eager", "fp6"}
        assert "error" not in str(results), printed
        assert results["fp6"]["weight_bytes"] < 0.6 * results["eager"]["weight_bytes"]
        assert all(result["ms_p50"] > 0 and {"swap_ms", "fuse_ms"} <= result.keys() for result in results.values())
        assert all("adapter" not in result for result in results.values())
        assert results["fp6"]["breakdown"]["gate_up"] > 0
        assert results["fp6"]["compile_cold_s"] >= 0
    assert results["eager"]["kv_cache_bytes"] == 2 * document["results"]["1"]["eager"]["kv_cache_bytes"]
    assert "tiny, batch 2" in printed
    assert plot.stat().st_size > 5000


def test_a_provider_that_fails_does_not_stop_the_others(small, captured, capfd, monkeypatch):
    def prepare(self, batch):
        if self.settings.provider == "inductor":
            raise RuntimeError("CUDA out of memory")
        return Bench.prepare(self, batch)

    def breakdown(self, token_ms):
        raise RuntimeError("the profiler is busy")

    monkeypatch.setattr(InProcess, "prepare", prepare)
    monkeypatch.setattr(InProcess, "breakdown", breakdown)
    backends = ["--backends", "eager", "inductor", "--once"]
    command.main(["--device", "cpu", "--tokens", "4", "--rounds", "1", "--prompt", "2", *backends, "--plot", "x"])
    printed = capfd.readouterr().out
    results = json.loads(printed.splitlines()[-1])["results"]["1"]
    assert results["inductor"] == {"error": "CUDA out of memory"}
    assert results["eager"]["ms_p50"] > 0
    assert "eager: no breakdown: the profiler is busy" in printed
    assert "no picture: plot: the document has no breakdown" in printed
    assert "inductor: not measured: CUDA out of memory" in printed


@pytest.mark.slow
def test_a_worker_measures_in_a_process_of_its_own_and_says_why_it_fails():
    settings = {"model": "tiny", "device": "cpu", "dtype": "bf16", "prompt": 2, "tokens": 3}
    worker = Worker(Settings("eager", **settings))
    assert worker.known["weight_bytes"] == 2 * parameter_count(SIZES["tiny"])
    worker.prepare(2)
    _, seconds, tokens = worker.round()
    assert len(seconds) == len(tokens) == 3
    with pytest.raises(RuntimeError, match="TypeError: .*batch"):
        worker.prepare()
    assert len(worker.round()[1]) == 3  # and goes on
    worker.close()


def test_weights_larger_than_the_memory_are_not_made():
    with pytest.raises(MemoryError, match="weights of 1000000.0 GB, .* GB are free"):
        memory.check(1e15, "cpu")


def test_a_picture_needs_a_breakdown(tmp_path):
    with pytest.raises(ValueError, match="no breakdown"):
        draw({"results": {"1": {"fp6": {}}}}, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--tokens", "2"], "--tokens: got 2, need a multiple of --steps-per-graph"),
        (["--tokens", "20", "--steps-per-graph", "8"], "--tokens: got 20"),
        (["--batch", "0"], "--batch: got 0"),
        (["--size", "9b"], "--size"),
        (["--temperature", "-1"], "--temperature: got -1"),
        (["--model", "nowhere"], "--model: got nowhere, which is no folder"),
        (["--backends", "int8"], "--backends: int8 needs torchao"),
    ],
)
def test_bad_arguments(bad, message, capsys, monkeypatch):
    from benchmarks.decode import arguments

    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main([*bad, "--device", "cpu"])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "fp6"])
def test_a_local_transformers_model(kind, tmp_path, captured):
    """From a folder: the tokens of `generate`, the cache's own positions wound back for every round."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 256}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = local.load(str(tmp_path), kind, head="float", dtype=torch.bfloat16, device="cpu")
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, PackedTensor) == (kind == "fp6")
    assert not isinstance(model.lm_head.weight, PackedTensor)
    provider = {"float": "inductor", "fp6": "fp6"}[kind]
    settings = {"model": str(tmp_path), "device": "cpu", "dtype": "bf16", "prompt": 4, "tokens": 6, "head": "float"}
    bench = Bench(Settings(provider, **settings))
    bench.prepare(1)
    rounds = [bench.round()[2] for _ in range(2)]
    generated = model.generate(torch.arange(4)[None], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert rounds == [generated[0, 4:].tolist()] * 2
    assert not isinstance(bench.model, Llama)
