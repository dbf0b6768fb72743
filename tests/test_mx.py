"""MXFP6 checkpoints: hand-made ones, whose values are known, and everything that is refused."""

import json

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import PackedTensor, init_empty_weights, load_quark_mxfp6
from fp6_compile.checkpoint.mx import e8m0, packed_tensor, unpack_codes
from fp6_compile.formats import FORMATS
from tests.support.checkpoints import mx_bytes
from tests.support.references import SIX_BITS

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")


def test_byte_order():
    """0b000001, 0b000010, 0b000100, 0b111000 as amd/Quark's comments draw them: v1 v0 | v2 v1 | v3 v2."""
    packed = torch.tensor([[0b10_000001, 0b0100_0000, 0b111000_00]], dtype=torch.uint8)
    assert unpack_codes(packed).tolist() == [[0b000001, 0b000010, 0b000100, 0b111000]]
    codes = torch.randint(0, 64, (5, 64), dtype=torch.uint8)
    torch.testing.assert_close(unpack_codes(mx_bytes(codes)), codes, rtol=0, atol=0)


def test_every_scale_is_exact():
    scales = e8m0(torch.arange(255, dtype=torch.uint8))
    expected = [2.0 ** (i - 127) for i in range(255)]
    assert scales.tolist() == expected
    assert scales.dtype == torch.float32
    assert scales[0] == 2.0**-127, "a subnormal, but there"
    with pytest.raises(ValueError, match=r"an E8M0 scale is NaN \(255\)"):
        e8m0(torch.tensor([[1, 255]], dtype=torch.uint8))


@pytest.mark.parametrize("fmt", SIX_BITS)
def test_every_code_with_every_scale(fmt):
    """All 64 codes under all 254 scales whose products float32 holds, against float64."""
    codes = torch.arange(64, dtype=torch.uint8).repeat(250, 1)
    scale = torch.arange(250, dtype=torch.uint8)[:, None].repeat(1, 2)
    packed = packed_tensor(mx_bytes(codes), scale, fmt, torch.float32)
    expected = FORMATS[fmt].values().double() * 2.0 ** (torch.arange(250, dtype=torch.float64)[:, None] - 127)
    torch.testing.assert_close(packed.dequantize().double(), expected, rtol=0, atol=0)
    assert packed.spec.group_size == 32
    torch.testing.assert_close(packed.codes(), codes, rtol=0, atol=0)


LAYERS = {"0": "e3m2", "2": "e2m3"}


def _model() -> nn.Module:
    with init_empty_weights():
        return nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64, bias=False), nn.Linear(64, 8)).half()


def _checkpoint(folder):
    """A checkpoint with both formats, and the float64 weights that it means."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"3.weight": torch.randn(8, 64), "0.bias": torch.randn(128), "3.bias": torch.zeros(8)}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    values = {}
    for layer, fmt in LAYERS.items():
        n, k = (128, 256) if layer == "0" else (64, 128)
        codes = torch.randint(0, 64, (n, k), dtype=torch.uint8, generator=generator)
        scale = torch.randint(110, 128, (n, k // 32), dtype=torch.uint8, generator=generator)
        tensors |= {f"{layer}.weight": mx_bytes(codes), f"{layer}.weight_scale": scale}
        powers = 2.0 ** (scale.double() - 127).repeat_interleave(32, 1)
        values[f"{layer}.weight"] = FORMATS[fmt].values().double()[codes.long()] * powers
    _write(folder, tensors)
    return tensors, values


def _write(folder, tensors, **changes) -> None:
    spec = {"qscheme": "per_group", "ch_axis": -1, "group_size": 32, "scale_format": "e8m0", **changes}
    config = {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp6_e3m2", **spec}},
        "layer_quant_config": {"2": {"weight": {"dtype": "fp6_e2m3", **spec}}},
        "exclude": ["3"],
    }
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    safetensors.save_file(tensors, folder / "model.safetensors")


def test_import_is_exact(tmp_path):
    tensors, values = _checkpoint(tmp_path)
    model = _model()
    report = load_quark_mxfp6(model, tmp_path)
    assert {line.name: line.shape for line in report.quantized} == {"0": (128, 256), "2": (64, 128)}
    for name, value in values.items():
        weight = model.get_parameter(name)
        assert isinstance(weight, PackedTensor)
        torch.testing.assert_close(weight.dequantize(torch.float32).double(), value, rtol=0, atol=0)
        assert (weight.dtype, weight.spec.format) == (torch.float16, LAYERS[name[0]])
    torch.testing.assert_close(model[3].weight.detach(), tensors["3.weight"].half(), rtol=0, atol=0)
    assert model(torch.randn(2, 256).half()).shape == (2, 8)
    # And through our own checkpoints.
    fp6_compile.save(model, tmp_path / "ours")
    again = _model()
    fp6_compile.load(again, tmp_path / "ours")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again.parameters(), model.parameters(), strict=True))


def _change(name, function):
    def change(folder, tensors):
        tensors[name] = function(tensors[name])
        _write(folder, tensors)

    return change


def _nan(scale):
    scale[3, 1] = 255
    return scale


BAD = {
    "a scale is NaN": (_change("0.weight_scale", _nan), r"an E8M0 scale is NaN \(255\)"),
    "shape": (_change("0.weight", lambda t: t[:, 3:].clone()), r"\[128, 189\] of U8 .* expected \[128, 192\] of U8"),
    "dtype": (_change("0.weight", lambda t: t.view(torch.int8)), "0.weight is .* of I8 in the checkpoint"),
    "scale shape": (_change("2.weight_scale", lambda t: t.T.contiguous()), r"2.weight_scale is \[4, 64\]"),
    "float scales": (_change("2.weight_scale", lambda t: t.half()), "of F16 .* expected .* of U8 or F8_E8M0"),
    "missing": (lambda f, t: _write(f, {n: v for n, v in t.items() if n != "3.bias"}), "3.bias is not in the checkpoint"),
    "groups": (lambda f, t: _write(f, t, group_size=64), "0 is 'fp6_e3m2' in groups of 64; read are .*fp6_e2m3.* of 32"),
    "another format": (lambda f, t: _write(f, t, dtype="fp4"), "0 is 'fp4' in groups of 32"),
    "integers": (_change("0.bias", lambda t: t.view(torch.int16)), "0.bias is I16 in the checkpoint and torch.float16 in"),
    "config is odd": (lambda f, t: (f / "config.json").write_text(
        '{"quantization_config": {"quant_method": "quark", "global_quant_config": 3}}'),
        "0: not a quantization_config of Quark's"),
    "another method": (lambda f, t: (f / "config.json").write_text("{}"), "no quantization_config of quant_method 'quark'"),
    "config is not JSON": (lambda f, t: (f / "config.json").write_text("{"), "config.json is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_refused_before_anything_is_changed(what, tmp_path):
    change, message = BAD[what]
    tensors, _ = _checkpoint(tmp_path)
    change(tmp_path, tensors)
    model = _model()
    with pytest.raises(ValueError, match=message):
        load_quark_mxfp6(model, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_packed_weights_are_floats(tmp_path):
    _checkpoint(tmp_path)
    model = _model().to(torch.float64)
    with pytest.raises(
        ValueError, match="0.weight is torch.float64 in the model, MX needs one of torch.float16, torch.bf"
    ):
        load_quark_mxfp6(model, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
