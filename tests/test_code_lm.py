"""The example model: its cache, its data split, its training, and the weights that are shipped with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.code_lm import data
from examples.code_lm.checkpoint import WEIGHTS, export_weights, load_pretrained, read_metadata
from examples.code_lm.generate import stream
from examples.code_lm.model import CodeLM, KVCache, ModelConfig
from examples.code_lm.train import TrainConfig, Trainer, learning_rate, parse_args, run

TINY = ModelConfig(dim=64, layers=2, hidden=128)
# Text that is long enough for a few windows; training on it needs no standard library.
TEXT = torch.arange(4096).remainder(97).to(torch.uint8)


def tiny_model(dtype: torch.dtype = torch.float32) -> CodeLM:
    """A random model whose every matrix matters; a fresh one writes nothing to the residual stream."""
    torch.manual_seed(0)
    model = CodeLM(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.to(dtype)


@pytest.fixture(scope="module")
def split() -> data.Split:
    """The standard library, read once."""
    return data.load_split()


# A rounding of the cache or the residual stream is an eps of the type; logits are about 3 here, layers are 2.
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-4), (torch.float16, 3e-2), (torch.bfloat16, 2e-1)], ids=str
)
@pytest.mark.parametrize("batch", [1, 2])
def test_cached_decode_equals_full_forward(dtype: torch.dtype, atol: float, batch: int) -> None:
    model = tiny_model(dtype)
    tokens = torch.randint(256, (batch, 24), generator=torch.Generator().manual_seed(1))
    full = model(tokens)
    cache = KVCache.allocate(TINY, batch, 32, dtype=dtype)
    parts = [model(tokens[:, :9], cache, torch.arange(9))]
    parts += [model(tokens[:, i : i + 1], cache, torch.tensor([i])) for i in range(9, 24)]
    assert full.dtype == torch.float32
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=atol)


def test_cache_ignores_what_it_holds_beyond_the_position() -> None:
    model, token, position = tiny_model(), torch.tensor([[7]]), torch.tensor([0])
    clean, dirty = KVCache.allocate(TINY, 1, 8), KVCache.allocate(TINY, 1, 8)
    for tensor in (*dirty.keys, *dirty.values):
        tensor.fill_(50.0)
    torch.testing.assert_close(model(token, clean, position), model(token, dirty, position), rtol=0, atol=0)


def test_compiled_decode_step_does_not_recompile() -> None:
    model = tiny_model()
    step = torch.compile(model, backend="eager", fullgraph=True)
    plain, compiled = KVCache.allocate(TINY, 1, 32), KVCache.allocate(TINY, 1, 32)
    step(torch.tensor([[0]]), compiled, torch.tensor([0]))
    model(torch.tensor([[0]]), plain, torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(1, 17):
            token, position = torch.tensor([[3 * i]]), torch.tensor([i])
            expected = model(token, plain, position)
            torch.testing.assert_close(step(token, compiled, position), expected)


def test_stream_is_greedy_or_seeded() -> None:
    model = tiny_model()
    calls = []

    def step(*inputs: object) -> torch.Tensor:
        calls.append(1)
        return model(*inputs)

    assert list(stream(model, b"def", 5)) == list(stream(model, b"def", 5, step=step))
    assert len(calls) == 5
    warm = [list(stream(model, b"def", 8, temperature=1.0, seed=s)) for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_split_is_disjoint_stable_and_independent_of_order() -> None:
    documents = {f"package/module{i}.py": data.SEPARATOR + b"%d" % i for i in range(1000)}
    first, second = data.split_documents(documents), data.split_documents(dict(reversed(documents.items())))
    assert torch.equal(first.train, second.train)
    assert first.held_out == second.held_out
    pieces = set(bytes(first.train.tolist()).split(data.SEPARATOR)[1:])
    assert pieces.isdisjoint(text[1:] for text in first.held_out.values())
    assert len(pieces) + len(first.held_out) == 1000
    assert 30 <= len(first.held_out) <= 70
    # The hash itself must never change: the shipped weights were trained on one side of it.
    assert [data.is_held_out(path) for path in ("dataclasses.py", "statistics.py", "ast.py")] == [True, True, False]


def test_read_documents_leaves_out_what_is_not_source(tmp_path: Path) -> None:
    contents = {
        "a.py": b"x = 1\r\n",
        "test/b.py": b"x = 2\n",
        "encodings/c.py": b"x = 3\n",
        "_sysconfigdata_x.py": b"x = 4\n",
        "latin.py": b"x = '\xe9'\n",
        "nul.py": b"x = '\0'\n",
        "empty.py": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert data.read_documents(tmp_path) == {"a.py": b"\0x = 1\n"}


def test_windows_predict_every_byte_once() -> None:
    text = data.SEPARATOR + bytes(range(1, 100))
    windows = data.held_out_windows({"a.py": text, "b.py": text[:5]}, length=32)
    targets = windows[:, 1:]
    assert targets[targets != data.PADDING].tolist() == [*range(1, 100), *range(1, 5)]
    uniform = torch.nn.Sequential(torch.nn.Embedding(256, 256))
    torch.nn.init.zeros_(uniform[0].weight)
    assert data.bits_per_byte(uniform, windows) == pytest.approx(8.0)


def test_shipped_weights_are_what_their_header_says(split: data.Split) -> None:
    config, provenance = read_metadata()
    assert WEIGHTS.stat().st_size <= 8_000_000
    model = load_pretrained()
    assert model.config == config
    assert model.parameter_count() == provenance["parameters"] <= 4_000_000
    windows = data.held_out_windows(split.held_out, length=provenance["length"])
    # Every so many windows; another Python's library has other files, and a sample this small is off by a tenth.
    sample = windows[:: math.ceil(len(windows) / 20)]
    claimed = provenance["held_out_bits_per_byte"]
    assert data.bits_per_byte(model, sample) == pytest.approx(claimed, abs=0.3)
    assert data.bits_per_byte(CodeLM(config), sample[:4]) > 3 * claimed


def test_interrupted_training_equals_uninterrupted(tmp_path: Path) -> None:
    config = TrainConfig(model=TINY, steps=2, batch_size=2, length=32)

    def trainer() -> Trainer:
        return Trainer(config, TEXT, device="cpu", compiled=False)

    whole = run(trainer(), tmp_path / "whole.pt")
    run(trainer(), tmp_path / "parts.pt", stop_after=1)
    second = trainer()
    second.resume(tmp_path / "parts.pt")
    assert second.progress.step == 1
    assert run(second, tmp_path / "parts.pt").loss == whole.loss
    other = Trainer(TrainConfig(model=TINY, steps=2, lr=1.0), TEXT, device="cpu", compiled=False)
    with pytest.raises(ValueError, match="of a run with another batch_size, length, lr"):
        other.resume(tmp_path / "parts.pt")


def test_export_round_trip(tmp_path: Path) -> None:
    model = tiny_model(torch.float16)
    export_weights(model, {"steps": 3}, tmp_path / "w.safetensors")
    loaded = load_pretrained(tmp_path / "w.safetensors", dtype=torch.float16)
    assert read_metadata(tmp_path / "w.safetensors") == (TINY, {"steps": 3})
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not written by"):
        read_metadata(tmp_path / "x.safetensors")


def test_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    config = TrainConfig()
    rates = [learning_rate(done, config) for done in (0.0, config.warmup, 0.5, 1.0, 1.1)]
    assert 0 < rates[0] < rates[1] == config.lr > rates[2] > rates[3] == rates[4] == pytest.approx(config.lr / 100)


def test_help_explains_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "--minutes" in printed
    assert "continue" in printed


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        ModelConfig(heads=3)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        ModelConfig(kv_heads=3)
    with pytest.raises(ValueError, match="give both or neither"):
        tiny_model()(torch.tensor([[0]]), input_pos=torch.tensor([0]))
    with pytest.raises(ValueError, match="too few to split"):
        data.split_documents({})
    with pytest.raises(ValueError, match="do not fit"):
        data.training_batch(TEXT[:8], 0, seed=0, batch_size=1, length=8)
    with pytest.raises(ValueError, match="must not be negative"):
        next(stream(tiny_model(), b"", 1, temperature=-1.0))
