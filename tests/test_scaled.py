"""FP8 and int8 checkpoints: dequantized with their scales, against float64, or refused by name."""

import json

import pytest
import torch
from torch import nn

from fp6_compile import PackedTensor, calibrate_, init_empty_weights, quantize_
from fp6_compile.storage.scaled import stored

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")

N, K = 200, 320  # no multiples of the blocks


def _model(dtype=torch.float16) -> nn.Linear:
    with init_empty_weights():
        return nn.Linear(K, N).to(dtype)


def _write(folder, scale, *, weight=None, config=None, suffix="_scale", **others) -> torch.Tensor:
    """A folder with these scales; returns the codes."""
    generator = torch.Generator().manual_seed(0)
    if weight is None:
        weight = torch.randn(N, K, generator=generator).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "bias": torch.zeros(N).bfloat16(), f"weight{suffix}": scale, **others}
    safetensors.save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return weight


def _scales(*shape, dtype=torch.float32):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)


def _compressed(strategy, format="float-quantized", **weights):
    weights = {"num_bits": 8, "symmetric": True, "strategy": strategy, **weights}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"weights": weights}},
    }
    return {**config, "ignore": ["lm_head"], "kv_cache_scheme": None}


DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT8 = torch.randint(-128, 128, (N, K), generator=torch.Generator().manual_seed(2)).to(torch.int8)
E5M2 = torch.randn(N, K, generator=torch.Generator().manual_seed(2)).to(torch.float8_e5m2)
GOOD = {
    "blocks": ({"scale": _scales(2, 3), "config": DEEPSEEK, "suffix": "_scale_inv"}, (128, 128)),
    "blocks, powers of two": ({"scale": _scales(2, 3, dtype=torch.float8_e8m0fnu), "config": DEEPSEEK}, (128, 128)),
    "oblong blocks": ({"scale": _scales(4, 10), "config": {**DEEPSEEK, "weight_block_size": [64, 32]}}, (64, 32)),
    "fp8, one scale": ({"scale": _scales(), "config": {"quant_method": "fp8"}, "suffix": "_scale_inv"}, (N, K)),
    "one scale in a list": ({"scale": _scales(1), "config": {"quant_method": "fp8", "weight_block_size": None}}, (N, K)),
    "fbgemm": ({"scale": _scales(N, 1), "config": {"quant_method": "fbgemm_fp8"}}, (1, K)),
    "e5m2": ({"scale": _scales(N, 1), "weight": E5M2}, (1, K)),
    "a list of rows": ({"scale": _scales(N)}, (1, K)),
    "no config": ({"scale": _scales(1, 1)}, (N, K)),
    "tensor": ({"scale": _scales(1), "config": _compressed("tensor")}, (N, K)),
    "channel": ({"scale": _scales(N, 1, dtype=torch.bfloat16), "config": _compressed("channel")}, (1, K)),
    "group": ({"scale": _scales(N, 5), "config": _compressed("group", group_size=64)}, (1, 64)),
    "block": ({"scale": _scales(2, 3), "config": _compressed("block", block_structure=[128, 128])}, (128, 128)),
    "block as text": ({"scale": _scales(2, 3), "config": _compressed("block", block_structure="128x128")}, (128, 128)),
    "int8": ({"scale": _scales(N, 1), "weight": INT8, "config": _compressed("channel", "int-quantized")}, (1, K)),
    "int8, one": ({"scale": _scales(1), "weight": INT8, "config": _compressed("tensor", "naive-quantized")}, (N, K)),
    "scales of activations": ({"scale": _scales(), "input_scale": _scales(), "weight_foo": None}, (N, K)),
}  # fmt: skip


@pytest.mark.parametrize("what", GOOD)
def test_weights_are_products_with_their_scales(what, tmp_path):
    given, (rows, columns) = GOOD[what]
    codes, scale = _write(tmp_path, **given), given["scale"].double()
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    each = scale.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
    expected = (codes.double() * each).float()
    torch.testing.assert_close(stored(tmp_path, ["weight"])["weight"].read(), expected, rtol=0, atol=0)
    plain, packed = _model(), _model()
    quantize_(plain, source=tmp_path, skip=["*"])
    torch.testing.assert_close(plain.weight.detach(), expected.half(), rtol=0, atol=0)
    assert quantize_(packed, source=tmp_path).quantized
    assert torch.equal(packed.weight, PackedTensor.quantize(expected, dtype=torch.float16))


def test_calibration_reads_them_too(tmp_path):
    _write(tmp_path, **GOOD["blocks"][0])
    model, plain = _model(), _model()
    calibrate_(model, source=tmp_path)
    quantize_(plain, source=tmp_path, skip=["*"])
    assert torch.equal(model.weight, PackedTensor.quantize(plain.weight.detach()))


def _at(value):
    scale = _scales(2, 3)
    scale[1, 2] = value
    return scale


PLAIN = torch.zeros(N, K).bfloat16()


def _said(config):
    """Weights of 16 bits, and what config.json says of them."""
    return {"scale": None, "weight": PLAIN, "config": config}


BAD = {
    "gptq": (_said({"quant_method": "gptq", "bits": 4}),
        "by quant_method 'gptq'; read are 'fp8', 'fbgemm_fp8' and 'compressed-tensors'; save the model in 16 bits"),
    "quark": (_said({"quant_method": "quark"}), "'quark'; .*: fp6_compile.load_quark_mxfp6 reads it"),
    "no method": (_said({"bits": 4}), "quantized by quant_method 'None'"),
    "method is a list": (_said({"quant_method": ["fp8"]}), r"quant_method \"\['fp8'\]\""),
    "config is a list": (_said([1]), "quantization_config is no table"),
    "without scales": ({"scale": None}, "weight is F8_E4M3, without scales, in source and torch.float16 in the model"),
    "int8 without scales": ({"scale": None, "weight": INT8}, "weight is I8, without scales, in source"),
    "scales of 16 bits": ({"scale": _scales(1), "weight": PLAIN}, "weight is BF16 with _scale in source; read are F8_E4M3"),
    "zero points": ({"scale": _scales(N, 1), "weight": INT8, "weight_zero_point": torch.zeros(N, 1).to(torch.int8)},
        "weight is I8 with _scale, _zero_point in source; read are F8_E4M3, F8_E5M2, I8 with a _scale or _scale_inv"),
    "two scales": ({"scale": _scales(1), "weight_scale_inv": _scales(1)}, "F8_E4M3 with _scale, _scale_inv in source"),
    "packed": ({"scale": _scales(N, 20), "weight": torch.zeros(N, K // 2).to(torch.uint8)}, "weight is U8 with _scale"),
    "shape": ({"scale": _scales(3, 2), "config": DEEPSEEK},
        r"weight_scale is \[3, 2\] of F32 in source, for \[200, 320\] in blocks of \[128, 128\]"),
    "rows, but blocks are said": ({"scale": _scales(N, 1), "config": DEEPSEEK}, r"weight_scale is \[200, 1\] of F32"),
    "blocks, but none are said": ({"scale": _scales(2, 3)}, r"\[2, 3\] of F32 .* in blocks of \[1, 320\] or \[200, 320\]"),
    "other rows": ({"scale": _scales(N - 1, 1)}, r"weight_scale is \[199, 1\] of F32"),
    "three dimensions": ({"scale": _scales(2, 3, 1), "config": DEEPSEEK}, r"weight_scale is \[2, 3, 1\]"),
    "dtype": ({"scale": torch.ones(N, 1).int()}, r"weight_scale is \[200, 1\] of I32 in source"),
    "NaN": ({"scale": _at(torch.nan), "config": DEEPSEEK}, "weight_scale has values that are NaN, infinite or negative"),
    "infinite": ({"scale": _at(torch.inf), "config": DEEPSEEK}, "weight_scale has values that are NaN"),
    "negative": ({"scale": _at(-1.0), "config": DEEPSEEK}, "weight_scale has values that are NaN"),
    "block size": ({"scale": _scales(2, 3), "config": {**DEEPSEEK, "weight_block_size": [128, 0]}},
        r"a block of scales is \[128, 0\] in config.json, needs two positive integers"),
    "block structure": (
        {"scale": _scales(2, 3), "config": _compressed("block", block_structure="128xa")}, "a block of scales is"),
    "pack-quantized": (_said(_compressed("group", "pack-quantized")),
        "compressed-tensors in format 'pack-quantized'; read are"),
    "four bits": (_said(_compressed("group", num_bits=4)), "symmetric weights of 8 bits are read"),
    "asymmetric": (_said(_compressed("tensor", symmetric=False)), "symmetric weights of 8"),
    "strategy": (_said(_compressed("token")), "strategy 'token' of compressed-tensors"),
    "sparse": (_said({**_compressed("tensor"), "sparsity_config": {"format": "sparse-bitmask"}}),
        "sparse and transformed weights of compressed-tensors are not read"),
    "transformed": (_said({**_compressed("tensor"), "transform_config": {"a": 1}}), "transformed"),
    "no groups": (_said({"quant_method": "compressed-tensors"}),
        "not a quantization_config of compressed-tensors: KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_refused_before_anything_is_changed(what, tmp_path):
    given, message = BAD[what]
    _write(tmp_path, **given)
    model = _model()
    with pytest.raises(ValueError, match=message):
        quantize_(model, source=tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_block_of_two_meanings_is_refused(tmp_path):
    """[1, 64] and [1, 96] both make two groups of 100 inputs."""
    config = _compressed("group", group_size=64)
    config["config_groups"]["group_1"] = {
        "weights": {**config["config_groups"]["group_0"]["weights"], "group_size": 96}
    }
    _write(tmp_path, _scales(N, 2), weight=torch.ones(N, 100).to(torch.float8_e4m3fn), config=config)
    with init_empty_weights():
        model = nn.Linear(100, N).half()
    with pytest.raises(ValueError, match=r"in blocks of \[1, 64\] or \[1, 96\]"):
        quantize_(model, source=tmp_path)


def test_the_models_own_names_are_no_scales(tmp_path):
    """A model may have 8-bit weights and scales of its own, which stay what they are."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", INT8.clone())
            self.register_buffer("weight_scale", _scales(N, 1))

    safetensors.save_file(Own().state_dict(), tmp_path / "model.safetensors")
    model = Own().to("meta")
    quantize_(model, source=tmp_path)
    assert torch.equal(model.weight, INT8)
    assert torch.equal(model.weight_scale, _scales(N, 1))


def test_buffers_that_are_not_persistent_are_the_models_own(tmp_path):
    """Old checkpoints have masks, of other dtypes, that models make themselves today."""
    model = nn.Linear(128, 128).half()
    model.register_buffer("mask", torch.ones(4, dtype=torch.bool), persistent=False)
    safetensors.save_file({**model.state_dict(), "mask": torch.zeros(9)}, tmp_path / "model.safetensors")
    quantize_(model, source=tmp_path)
    assert torch.equal(model.mask, torch.ones(4, dtype=torch.bool))
