"""from_pretrained and save_pretrained of packed transformers models."""

import json
import logging
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fp6_compile
from fp6_compile import CheckpointError, Fp6Config, PackedTensor
from fp6_compile.packed import low_rank
from tests.support.hf import SIDE, SIZES, TOKENS, llama, logits, packed, transformers

LINEARS = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"} | {
    f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
}


def load(folder, **fields):
    config = {"quantization_config": Fp6Config(**fields)} if fields else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **config)


def about(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An untied Llama in BF16, in shards."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    llama().save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    load(source, group_size=64).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.mark.parametrize(
    ("dtype", "asked"), [("bfloat16", "auto"), ("float16", "auto"), ("float32", "auto"), ("float32", "bfloat16")]
)
def test_quantizes_while_loading_as_quantize_does(dtype, asked, tmp_path):
    llama(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=asked, quantization_config=Fp6Config(group_size=64)
    )
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=asked)
    fp6_compile.quantize_(expected, group_size=64, include_float32=True, skip=["lm_head"])
    assert packed(model) == LINEARS
    assert model.dtype == getattr(torch, dtype if asked == "auto" else asked)
    assert all(torch.equal(model.get_parameter(name), expected.get_parameter(name)) for name in LINEARS)
    assert torch.equal(logits(model), logits(expected))


def test_round_trip_is_bit_identical(source, saved, tmp_path):
    first, second = load(source, group_size=64), load(saved)
    assert packed(second) == LINEARS
    assert torch.equal(logits(first), logits(second))
    second.save_pretrained(tmp_path, max_shard_size="100KB")
    names = {path.name for path in saved.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert not [name for name in names if (saved / name).read_bytes() != (tmp_path / name).read_bytes()]


def test_safetensors_alone_opens_the_folder(saved):
    found = {}
    for path in saved.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in set(file.keys())}
            found |= {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    name = "model.layers.0.mlp.down_proj.weight"
    assert found[f"{name}_w4"] == ("U8", [128, 128])
    assert found[f"{name}_w2"] == ("U8", [128, 64])
    assert found[f"{name}_scale"] == ("F32", [128, 4])
    assert name not in found
    assert found["lm_head.weight"] == ("BF16", [256, 128])
    assert about(saved) == {
        **{"quant_method": "fp6", "version": 2, "format": "e2m3", "group_size": 64},
        **{"modules_to_not_convert": ["lm_head"], "module_formats": {}},
    }


def test_package_s_own_load_and_from_pretrained_read_each_other_s_folders(saved, source, tmp_path):
    model = load(source, format="e3m2")
    fp6_compile.load(model, saved)
    expected = load(saved)
    assert torch.equal(logits(model), logits(expected))
    fp6_compile.save(model, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(expected))


@pytest.mark.parametrize("auto", [False, True])
def test_no_quantization_config_is_that_of_the_folder(auto, saved):
    """Not a model of random weights, which transformers would make of an explicit None."""
    cls = transformers.AutoModelForCausalLM if auto else transformers.LlamaForCausalLM
    assert packed(cls.from_pretrained(saved, quantization_config=None)) == LINEARS


def test_saves_replace_each_other(saved, source, tmp_path):
    """By both writers, in one file or several: readers find the last one, and nothing else is left."""
    first, second = load(saved), load(source, format="e3m2")
    saves = [
        (first, lambda model: fp6_compile.save(model, tmp_path, shard_bytes=50_000)),
        (second, lambda model: model.save_pretrained(tmp_path)),
        (first, lambda model: model.save_pretrained(tmp_path, max_shard_size="100KB")),
        (second, lambda model: fp6_compile.save(model, tmp_path)),
        (first, lambda model: model.save_pretrained(tmp_path)),
    ]
    for model, save in saves:
        save(model)
        again = load(tmp_path)
        assert all(torch.equal(again.get_parameter(name), model.get_parameter(name)) for name in LINEARS)
        index = tmp_path / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {path.name for path in tmp_path.glob("*.safetensors")} - named <= {
            path.name for path in tmp_path.glob("fp6-b*")
        }
        assert (tmp_path / "model.safetensors").exists() != index.exists()


def test_models_that_quantize_packed_are_saved_and_dequantized(source, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    fp6_compile.quantize_(model, format="e3m2", skip=["*.up_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert packed(again) == packed(model) == LINEARS - {"model.layers.0.mlp.up_proj.weight"}
    assert torch.equal(logits(again), logits(model))
    assert about(tmp_path)["format"] == "e3m2"
    assert about(tmp_path)["modules_to_not_convert"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert not packed(model.dequantize())


def test_calibrated_models_grow_again(source, tmp_path):
    """calibrate_ adds low-rank factors and biases, which the model's class does not have."""
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    fp6_compile.quantize_(model, skip=["lm_head"])
    linear = model.model.layers[0].mlp.up_proj
    low_rank.grow(linear, "low_rank_a", torch.randn(128, 4, dtype=torch.bfloat16))
    low_rank.grow(linear, "low_rank_b", torch.randn(4, 256, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_heads(tied, tmp_path):
    """Heads stay unless asked for; one that is tied to the embedding stays in any case."""
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source", modules_to_not_convert=[])
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert packed(model) == packed(again) == (LINEARS if tied else LINEARS | {"lm_head.weight"})
    assert torch.equal(logits(model), logits(again))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_modules_to_not_convert_and_formats_by_module(source, tmp_path, caplog):
    down = "model.layers.0.mlp.down_proj"
    with caplog.at_level(logging.INFO, "fp6_compile"):
        model = load(
            source,
            modules_to_not_convert=["lm_head", "self_attn", "model.layers.0.self_attn", "nonsense"],
            module_formats={down: {"format": "e2m2", "group_size": 32}},
        )
    assert {name.rpartition(".")[0] for name in packed(model)} == {
        down,
        down.replace("down", "up"),
        down.replace("down", "gate"),
    }
    assert model.get_parameter(f"{down}.weight").spec[:3:2] == ("e2m2", 32)
    assert "'nonsense' matches no module of LlamaForCausalLM" in caplog.text
    assert "3 of 8 linears in e2m3, 5 skipped (5: modules_to_not_convert)" in caplog.text
    model.save_pretrained(tmp_path)
    assert about(tmp_path)["module_formats"] == {down: {"format": "e2m2", "group_size": 32}}
    assert torch.equal(logits(load(tmp_path)), logits(model))
    with pytest.raises(ValueError, match="module_formats names 'nonsense', which is no module"):
        load(source, module_formats={"nonsense": {"format": "e3m2"}})


def test_target_bits(source, tmp_path):
    model = load(source, format="auto", target_bits=6.4)
    weights = [model.get_parameter(name) for name in LINEARS]
    bits = 8 * sum(w.packed_bytes for w in weights) / sum(w.numel() for w in weights)
    assert bits <= 6.6  # of padded planes
    assert len({w.spec.format for w in weights}) > 1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_dequantize(saved, tmp_path):
    model = load(saved)
    ordinary = load(saved, dequantize=True)
    expected = {name: model.get_parameter(name).dequantize() for name in LINEARS}
    assert not packed(ordinary)
    assert all(torch.equal(ordinary.get_parameter(name), weight) for name, weight in expected.items())
    ordinary.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    model.dequantize()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in expected.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model.config, "quantization_config")


def test_a_weight_that_cannot_be_packed_stays(tmp_path, caplog):
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.DEBUG, "fp6_compile"):
        loaded = load(tmp_path, format="e3m2")
    assert packed(loaded) == LINEARS - {"model.layers.0.mlp.up_proj.weight"}
    assert "NaN" in caplog.text


def test_the_users_config_is_not_changed(source):
    config = Fp6Config("auto", module_formats={"model.layers.0.mlp.down_proj": {"group_size": 32}})
    before = config.to_dict()
    transformers.LlamaForCausalLM.from_pretrained(source, quantization_config=config)
    assert config.to_dict() == before


def _mixtral():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config), 4, "block_sparse_moe.experts.0.w1.weight"


def _qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)), 7, "self_attn.q_norm.weight"


def _bert():
    return (
        transformers.BertForMaskedLM(transformers.BertConfig(**SIDE, vocab_size=256)),
        7,
        "attention.self.key.weight_w2",
    )


def _llava():
    vision = transformers.CLIPVisionConfig(**SIDE, image_size=32, patch_size=16, projection_dim=128)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SIZES), image_token_index=255
    )
    return transformers.LlavaForConditionalGeneration(config), 15, "language_model.model.layers.0.mlp.up_proj.weight_w4"


@pytest.mark.parametrize("make", [_mixtral, _qwen3, _bert, _llava])
def test_other_models(make, tmp_path):
    """Files have the names of the checkpoints that transformers reads, also where the modules are called otherwise."""
    model, linears, stored = make()
    model.bfloat16().save_pretrained(tmp_path / "source")
    model = type(model).from_pretrained(tmp_path / "source", quantization_config=Fp6Config())
    assert len(packed(model)) == linears
    model.save_pretrained(tmp_path / "packed")
    assert any(stored in name for name in load_file(tmp_path / "packed/model.safetensors"))
    again = type(model).from_pretrained(tmp_path / "packed")
    assert packed(again) == packed(model)
    assert torch.equal(logits(again), logits(model))


def test_a_base_model_takes_its_part(saved):
    base = transformers.AutoModel.from_pretrained(saved)
    assert packed(base) == {name.removeprefix("model.") for name in LINEARS}
    with torch.no_grad():
        assert torch.equal(base(TOKENS)[0], load(saved).model(TOKENS)[0])


def _rewrite(path, change, metadata=None):
    with safe_open(path, "pt") as file:
        metadata = metadata or file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def _file(folder, tensor):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


PLANE = "model.layers.0.mlp.up_proj.weight_w2"


def _config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE = {
    "lost plane": (lambda f: _rewrite(_file(f, PLANE), lambda t: t.pop(PLANE)), CheckpointError, "up_proj.weight_w2"),
    "flipped": (
        lambda f: _rewrite(_file(f, PLANE), lambda t: t[PLANE].add_(1)),
        CheckpointError,
        "weight_w2 .* damaged",
    ),
    "embedding": (
        lambda f: _rewrite(_file(f, "model.embed_tokens.weight"), lambda t: t["model.embed_tokens.weight"].add_(1)),
        CheckpointError,
        "embed_tokens.weight .* damaged",
    ),
    "lost file": (lambda f: _file(f, PLANE).unlink(), CheckpointError, "missing"),
    "no metadata": (lambda f: _rewrite(_file(f, PLANE), len, {"format": "pt"}), CheckpointError, "gives no version"),
    "format": (lambda f: _config(f, format="e3m2"), CheckpointError, "config.json says of model.layers.0.* e3m2, 64"),
    "group": (lambda f: _config(f, group_size=32), CheckpointError, "e2m3, 32; the shard that has it: e2m3, 64"),
    "not packed": (
        lambda f: _config(f, modules_to_not_convert=["model.layers.0.mlp.up_proj"]),
        CheckpointError,
        "up_proj .* is not packed",
    ),
    "unknown": (lambda f: _config(f, module_formats={"x": {"format": "e3m2"}}), CheckpointError, "gives x a format"),
    "version": (lambda f: _config(f, version=3), ValueError, "version got 3"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_errors(case, saved, tmp_path):
    """And not random weights with a warning."""
    damage, kind, match = DAMAGE[case]
    shutil.copytree(saved, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(kind, match=match):
        load(tmp_path / "copy")


def test_a_state_dict_alone_is_an_error(saved):
    config = transformers.AutoConfig.from_pretrained(saved)
    with pytest.raises(CheckpointError, match="loaded from its folder"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={"x": torch.zeros(1)})


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, source, saved):
    pytest.importorskip("accelerate")
    model = transformers.LlamaForCausalLM.from_pretrained(saved, device_map=device_map)
    assert torch.equal(logits(model), logits(load(saved)))
    config = Fp6Config(group_size=64)
    quantized = transformers.LlamaForCausalLM.from_pretrained(source, device_map=device_map, quantization_config=config)
    assert torch.equal(logits(quantized), logits(model))


def test_what_is_not_packed_can_be_on_disk(source, saved, tmp_path):
    pytest.importorskip("accelerate")
    head = {"model": "cpu", "lm_head": "disk"}
    model = transformers.LlamaForCausalLM.from_pretrained(saved, device_map=head, offload_folder=tmp_path / "a")
    assert torch.equal(logits(model), logits(load(saved)))
    with pytest.raises(ValueError, match="lm_head.weight is offloaded"):
        model.save_pretrained(tmp_path / "b")
    layers = {"model.layers": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    for folder, config in ((saved, {}), (source, {"quantization_config": Fp6Config()})):
        with pytest.raises(ValueError, match="device_map puts model.layers.0.* on the disk"):
            transformers.LlamaForCausalLM.from_pretrained(
                folder, device_map=layers, offload_folder=tmp_path / "a", **config
            )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"format": "e9m9"}, "'format' got 'e9m9', needs 'auto' or one of"),
        ({"group_size": 0}, "'group_size' got 0, needs a positive integer or None"),
        ({"scale_method": "best"}, "'scale_method' got 'best'"),
        ({"min_features": 1.5}, "'min_features' got 1.5"),
        ({"include_float32": 1}, "'include_float32' got 1"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert got 'lm_head', needs a list"),
        ({"modules_to_not_convert": 3}, "modules_to_not_convert got 3, needs a list"),
        ({"target_bits": 6}, "target_bits got 6 with format='e2m3', needs a number, beside format='auto'"),
        ({"module_formats": ["x"]}, "module_formats got .*, needs a dictionary by module name"),
        ({"module_formats": {"x": {"bits": 4}}}, "module_formats.'x'. got"),
        ({"module_formats": {"x": {"format": "e9m9"}}}, "'format' got 'e9m9'"),
        ({"dequantize": "yes"}, "dequantize got 'yes', needs True or False"),
        ({"version": 7}, "version got 7, this fp6_compile knows 2"),
        ({"quant_method": "awq"}, "quant_method got 'awq'"),
        ({"bits": 6}, "no field 'bits', its fields are"),
    ],
)
def test_bad_values_name_the_field(fields, match):
    with pytest.raises(ValueError, match=match):
        Fp6Config(**fields)


def test_config_as_a_dictionary(source):
    config = Fp6Config("e3m2", group_size=64, scale_method="mse", modules_to_not_convert=["lm_head"])
    assert Fp6Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
    model = transformers.LlamaForCausalLM.from_pretrained(source, quantization_config=config.to_dict())
    assert packed(model) == LINEARS
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)
    assert not isinstance(model.lm_head.weight, PackedTensor)
