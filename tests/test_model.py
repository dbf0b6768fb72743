"""quantize_: which linears it takes, what becomes of the rest, where values come from, and when memory is freed."""

import copy
import re

import pytest
import torch
from torch import nn

from fp6_compile import PackedTensor, init_empty_weights, quantize_
from fp6_compile.formats import get_format
from tests.support.models import Tower
from tests.support.references import close, dequantized_

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")


REASONS = {
    "head": "shared with embed (Embedding)",
    "odd": "of Odd, which is no nn.Linear",
    "experts": "of Tower, which is no nn.Linear",
    "gate": "fewer than 128 inputs or outputs (min_features)",
    "first": None,
}


def _tower(dtype: torch.dtype = torch.float16) -> Tower:
    torch.manual_seed(0)
    return Tower().to(dtype).eval()


def test_takes_plain_linears_and_says_why_not_the_others():
    model = _tower()
    expected = dequantized_(copy.deepcopy(model), ["first.weight"])
    report = quantize_(model)
    assert {line.name: line.reason for line in report.linears} == REASONS
    assert model.second.weight is model.first.weight
    assert isinstance(model.first.weight, PackedTensor)
    assert model.head.weight is model.embed.weight
    assert model.norm.weight.requires_grad, "what is left alone is not touched"
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        close(model(tokens), expected(tokens))


def test_report_has_true_bytes():
    model = _tower()
    report = quantize_(model, format="e2m3", group_size=64)
    (line,) = report.quantized
    assert (line.shape, line.bytes_before) == ((256, 256), 2 * 256 * 256)
    assert line.bytes_after == 256 * 256 * 6 // 8 + 4 * 4 * 256 == model.first.weight.packed_bytes
    assert "1 of 5 linears in e2m3" in report.summary()


def test_options_are_the_backends():
    model = _tower()
    report = quantize_(model, format="e2m3", group_size=32, scale_method="mse", skip=["fir*", "x"], min_features=4)
    assert [line.name for line in report.quantized] == ["gate"]
    assert {line.name: line.reason for line in report.linears}["first"] == "skipped by 'fir*'"
    expected = PackedTensor.quantize(_tower().gate.weight, "e2m3", 32, "mse")
    assert torch.equal(model.gate.weight, expected)


def test_second_time_changes_nothing():
    model = _tower()
    quantize_(model, format="e2m3")
    weight = model.first.weight
    report = quantize_(model)
    assert model.first.weight is weight
    assert [(line.name, line.note) for line in report.quantized] == [("first", "packed already")]


def test_float32_is_asked_for():
    model = _tower(torch.float32)
    assert not quantize_(model).quantized
    assert [line.name for line in quantize_(model, include_float32=True).quantized] == ["first"]
    assert model.first.weight.dtype == torch.float32


def test_nan_weight_is_left_and_reported():
    model = _tower()
    model.first.weight.data[3, 4] = torch.nan
    weight = model.first.weight
    reasons = {line.name: line.reason for line in quantize_(model).linears}
    assert reasons["first"] == "weight: 1 of 65536 values are NaN or infinite"
    assert model.first.weight is weight


BAD = {
    "format": ({"format": "e9m9"}, "option 'format' got 'e9m9', needs 'auto' or one of"),
    "group_size": ({"group_size": 0}, "option 'group_size' got 0, needs a positive integer or None"),
    "scale_method": ({"scale_method": "max"}, "option 'scale_method' got 'max'"),
    "skip": ({"skip": "lm_head"}, "option 'skip' got 'lm_head', needs a list"),
    "strict": (
        {"strict": True, "skip": ["experts", "odd"]},
        r"strict: cannot quantize head: shared with embed \(Embedding\)",
    ),
    "strict, odd": (
        {"strict": True, "skip": ["head", "embed", "experts"]},
        "strict: cannot quantize odd: of Odd, which is no",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_refusal_leaves_the_model_as_it_was(what):
    options, message = BAD[what]
    model = _tower()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        quantize_(model, **options)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_strict_looks_for_nan_before_it_packs():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).half()
    model[1].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="strict: cannot quantize 1: NaN or infinite values"):
        quantize_(model, strict=True)
    assert not isinstance(model[0].weight, PackedTensor)


def _write_source(model: nn.Module, folder, shards: int = 2) -> None:
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in ("head.weight", "second.weight")
    }
    for i in range(shards):
        part = dict(list(state.items())[i::shards])
        safetensors.save_file(part, folder / f"model-{i}.safetensors")


def test_from_a_source_with_parameters_on_the_meta_device(tmp_path):
    original = _tower()
    _write_source(original, tmp_path)
    with init_empty_weights():
        model = Tower().half()
    assert model.first.weight.is_meta
    assert model.second.weight is model.first.weight
    assert model.frequencies.device.type == "cpu"
    model.frequencies = original.frequencies
    report = quantize_(model, source=tmp_path)
    assert {line.name: line.reason for line in report.linears} == REASONS
    quantize_(original)
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(tokens), original(tokens))
    assert model.head.weight is model.embed.weight


def test_source_is_quantized_as_it_is_and_presented_in_the_models_dtype(tmp_path):
    layer = nn.Linear(256, 128)
    safetensors.save_file(layer.state_dict(), tmp_path / "model.safetensors")
    with init_empty_weights():
        model = nn.Linear(256, 128).bfloat16()
    quantize_(model, source=tmp_path)
    expected = PackedTensor.quantize(layer.weight, dtype=torch.bfloat16)
    assert torch.equal(model.weight, expected)
    assert model.bias.dtype == torch.bfloat16


def _lacking(folder):
    safetensors.save_file({"weight": torch.zeros(128, 256)}, folder / "model.safetensors")


def _misshapen(folder):
    safetensors.save_file({"weight": torch.zeros(256, 128), "bias": torch.zeros(128)}, folder / "model.safetensors")


def _cut_off(folder):
    safetensors.save_file({"weight": torch.zeros(128, 256), "bias": torch.zeros(128)}, folder / "model.safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _indexed(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "a.safetensors"}}')


def _bad_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def _integers(folder):
    safetensors.save_file(
        {"weight": torch.zeros(128, 256), "bias": torch.zeros(128).int()}, folder / "model.safetensors"
    )


SOURCES = {
    "integers": (_integers, ValueError, "bias is I32, without scales, in source and torch.float16 in the model"),
    "nothing": (lambda folder: None, FileNotFoundError, "no safetensors files in it"),
    "a tensor is missing": (_lacking, ValueError, "1 tensors of the model are not in source: bias"),
    "another shape": (_misshapen, ValueError, r"weight is \[256, 128\] in source and \[128, 256\] in the model"),
    "cut off": (_cut_off, ValueError, "model.safetensors: not a whole safetensors file"),
    "file of the index is missing": (
        _indexed,
        FileNotFoundError,
        "a.safetensors, which model.safetensors.index.json names",
    ),
    "index is none": (_bad_index, ValueError, "model.safetensors.index.json: not an index"),
}


@pytest.mark.parametrize("what", SOURCES)
def test_bad_source_leaves_the_model_as_it_was(what, tmp_path):
    prepare, error, message = SOURCES[what]
    prepare(tmp_path)
    with init_empty_weights():
        model = nn.Linear(256, 128).half()
    with pytest.raises(error, match=message):
        quantize_(model, source=tmp_path)
    assert model.weight.is_meta


def test_meta_device_without_a_source():
    with torch.device("meta"):
        model = nn.Linear(256, 128).half()
    with pytest.raises(
        ValueError, match=r"2 tensors .* on the meta device: give source=.*init_empty_weights\(\).*: weight, bias"
    ):
        quantize_(model)


def test_no_safetensors_library(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install safetensors"):
        quantize_(nn.Linear(256, 128).half(), source=tmp_path)


def test_16_bit_weights_are_freed_layer_by_layer():
    """No storage of a packed layer is alive when the next one is packed."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4))).half()
    storages = [torch.multiprocessing.reductions.StorageWeakRef(layer.weight.untyped_storage()) for layer in model]
    seen = []
    original = PackedTensor.quantize.__func__

    def spy(cls, *args):
        seen.append([storage.expired() for storage in storages])
        return original(cls, *args)

    PackedTensor.quantize = classmethod(spy)
    try:
        quantize_(model)
    finally:
        PackedTensor.quantize = classmethod(original)
    assert seen == [[i < done for i in range(4)] for done in range(4)]
    assert all(storage.expired() for storage in storages)


def test_progress_is_silent_where_it_is_no_terminal(capsys):
    quantize_(_tower())
    assert re.sub(r"\s", "", capsys.readouterr().err) == ""


def test_an_encoder_layer_runs_packed():
    """Its fast path hands weights to a fused operator; packed ones must take the other."""
    layer = nn.TransformerEncoderLayer(256, 4, 256, batch_first=True).half().eval()
    x = torch.randn(2, 3, 256).half()
    expected = dequantized_(copy.deepcopy(layer), ["linear1.weight", "linear2.weight", "self_attn.out_proj.weight"])
    assert [line.name for line in quantize_(layer).quantized] == ["self_attn.out_proj", "linear1", "linear2"]
    with torch.inference_mode():
        close(layer(x), expected(x))


def test_conv1d_of_transformers_is_reported():
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=512, n_positions=128, **ids)
    report = quantize_(transformers.GPT2LMHeadModel(config).half())
    assert {line.reason for line in report.linears} == {
        "of Conv1D, which is no nn.Linear",
        "shared with transformer.wte (Embedding)",
    }


def _bits(model):
    packed = [p for p in model.parameters() if isinstance(p, PackedTensor)]
    return 8 * sum(p.packed_bytes for p in packed) / sum(p.numel() for p in packed)


@pytest.mark.slow
def test_formats_are_mixed_to_a_target_size():
    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(6))).half()

    model = build()
    quantize_(model, format="auto", target_bits=6.2)
    assert {linear.weight.spec.format for linear in model} == {"e2m3"}
    assert _bits(model) == pytest.approx(6.125, abs=0.01)
    model = build()
    quantize_(model, format="auto", target_bits=5.7, sensitivity={str(i): 100.0 if i == 2 else 1.0 for i in range(6)})
    kept = [p.spec.format for p in model.parameters()]
    assert _bits(model) <= 5.7
    assert get_format(kept[2]).bits == max(get_format(name).bits for name in kept) > 5
    broken = build()
    broken[3].weight.data[0, 0] = torch.nan
    report = quantize_(broken, format="auto", target_bits=5.7)
    assert [line.quantized for line in report.linears] == [True, True, True, False, True, True]
    given = build()
    for how, message in (
        ({"target_bits": 5}, r"target_bits: got 5 with format='.*', needs format='auto'"),
        ({"format": "auto", "target_bits": 4}, "target_bits: got 4, needs at least 4.13"),
        ({"format": "auto", "target_bits": 6, "sensitivity": dict.fromkeys("0123459", 1.0)}, "sensitivity: got '9'"),
        ({"format": "auto", "target_bits": 6, "sensitivity": {"0": 1.0}}, "sensitivity: lacks '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_(given, **how)
    assert not any(isinstance(p, PackedTensor) for p in given.parameters())
