"""The decode example: what is packed, what is read, and the whole command on the tiny size."""

import json

import pytest
import torch

from examples import decode_latency
from examples.code_lm.model import KVCache
from examples.decode.card import summary
from examples.decode.loop import decode, make_step
from examples.decode.model import SIZES, PackedLinear, build, weight_bytes

TINY = SIZES["tiny"]


def _build(packed):
    return build(TINY, packed=packed, dtype=torch.bfloat16, device="cpu")


def test_a_packed_model_has_no_float_linear_and_the_same_weights():
    plain, packed = _build(False), _build(True)
    assert not any(isinstance(m, torch.nn.Linear) for m in packed.modules())
    q = packed.layers[0].attention.q_proj
    assert isinstance(q, PackedLinear)
    w = torch.ops.fp6.dequantize([q.w4, q.w2], q.scale, "e3m2", q.layout, None, TINY.dim, torch.bfloat16)
    torch.testing.assert_close(w, plain.layers[0].attention.q_proj.weight, rtol=0.13, atol=2e-3)
    assert torch.equal(packed.embedding.weight, plain.embedding.weight)


def test_weight_bytes_counts_an_embedding_as_not_read():
    total, read = weight_bytes(_build(False))
    assert total - read == 2 * TINY.vocab * TINY.dim
    assert total == 2 * _build(False).parameter_count()


def test_the_step_counts_positions_and_fills_the_cache():
    model = _build(True)
    cache = KVCache.allocate(TINY, 1, 5, dtype=torch.bfloat16)
    seconds, tokens = decode(make_step(model, cache), 1, 5, "cpu")
    assert len(seconds) == len(tokens) == 5
    assert all(keys.abs().amax(-1).gt(0).all() for keys in cache.keys)
    # Greedy decoding is a function of the tokens before: one pass over them all chooses the same.
    with torch.no_grad():
        logits = model(torch.tensor([[1, *tokens[:-1]]]))
    assert logits[0].argmax(-1).tolist() == tokens


def test_summary_of_times():
    result = summary({"read_bytes": 4e9}, [0.4, 0.5, 0.6], batch=2, bandwidth=20.0)
    assert (result["ms_p50"], result["tokens_per_s"], result["gb_s"], result["share_of_read"]) == (500, 4, 8, 0.4)


def test_the_command_ends_with_one_line_of_json(capfd):
    decode_latency.main(["--size", "tiny", "--device", "cpu", "--tokens", "4", "--rounds", "1", "--threads", "1"])
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert document["results"].keys() == {"inductor", "fp6"}
    assert document["weight_memory"] < 0.45
    assert document["results"]["fp6"]["ms_p50"] > 0


@pytest.mark.parametrize("bad", [["--tokens", "2"], ["--batch", "0"], ["--size", "9b"]])
def test_bad_arguments(bad, capsys):
    with pytest.raises(SystemExit):
        decode_latency.main(bad)
    assert bad[0] in capsys.readouterr().err
