"""The example of a decode loop: it decodes greedily through the cache, and prints a line for each backend."""

import torch

from examples import decode_latency
from examples.code_lm.model import CodeLM, ModelConfig

SMALL = ModelConfig(vocab=320, dim=128, layers=1, heads=4, kv_heads=2, hidden=384)


def _small(layers: int = 1) -> CodeLM:
    torch.manual_seed(0)
    return CodeLM(SMALL).to(decode_latency.DEVICE, torch.bfloat16).eval().requires_grad_(False)


def test_steps_are_greedy_and_continue_the_prompt():
    model, tokens = _small(), list(range(decode_latency.PROMPT))

    def step(token, cache, position):
        tokens.append(int(token))
        assert int(position) == len(tokens) - 1
        return model(token, cache, position)

    assert len(decode_latency.decode(model, step, 3)) == 3
    assert len(tokens) == decode_latency.PROMPT + decode_latency.WARM_UP + 3
    prefix = torch.tensor([tokens[:-1]], device=decode_latency.DEVICE)
    with torch.no_grad():
        assert int(model(prefix)[0, -1].argmax()) == tokens[-1]


def test_a_line_for_each_backend(monkeypatch, capsys):
    compiled = []

    def compile(model, *, backend, **options):
        compiled.append(backend)
        return model

    monkeypatch.setattr(decode_latency, "make", _small)
    monkeypatch.setattr(torch, "compile", compile)
    decode_latency.main(["--tokens", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert compiled == ["inductor", "fp6"]
    assert [line.split()[0] for line in lines[1:]] == compiled
    assert all(line.endswith("ms per token") for line in lines[1:])
