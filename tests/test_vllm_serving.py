"""The plug-in inside vLLM, on a CPU: `make test-vllm`. benchmarks/serving compares more engines, compiled ones, too."""

import importlib.metadata
import importlib.util
import json
import os
import shutil

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

import torch
from safetensors.torch import load_file, save_file

from benchmarks.serving import worker
from benchmarks.serving.models import VOCABULARY, make, pack
from fp6_compile.integrations import vllm as plugin

os.environ.update(worker.ENVIRONMENT)
# vLLM's own warnings, of several libraries.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama in 16 bits, packed with its head, and dequantized."""
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder / "plain")
    pack(folder / "plain", folder / "packed", folder / "dequantized", group_size=64, skip=())
    return folder


def engine(folder, **settings):
    return worker.engine(str(folder), **{"enforce_eager": True, "dtype": "float32", **settings})


def tokens(folder, **settings):
    return worker.generate(engine(folder, **settings), VOCABULARY)


def refused(folder, message, **settings):
    with pytest.raises(Exception, match=message):
        engine(folder, **settings)


def copy(source, target, change=None, **config):
    """A copy of a folder with changed tensors, or another quantization_config."""
    shutil.copytree(source, target)
    if change is not None:
        file = "model.safetensors"
        tensors = load_file(target / file)
        change(tensors)
        save_file(tensors, target / file, {"format": "pt"})
    about = json.loads((target / "config.json").read_text())
    about["quantization_config"] |= config
    (target / "config.json").write_text(json.dumps(about))
    return target


def names(llm):
    """The parameters of the engine's model."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    return dict(model.named_parameters())


def test_vllm_finds_the_plugin():
    (found,) = [each for each in importlib.metadata.entry_points(group="vllm.general_plugins") if each.name == "fp6"]
    assert found.load() is plugin.register


def test_a_packed_folder_gives_the_tokens_of_the_dequantized_one(folders):
    assert tokens(folders / "packed") == tokens(folders / "dequantized")


def test_linears_and_head_are_packed(folders):
    found = names(engine(folders / "packed"))
    sixteen = {name for name in found if not name.rpartition(".")[2].startswith("weight_")}
    assert not [name for name in sixteen if "norm" not in name and "embed" not in name]
    assert found["lm_head.weight_w4"].dtype == torch.uint8
    scale = found["model.layers.0.self_attn.qkv_proj.weight_scale"]
    assert (scale.shape, scale.dtype) == ((4, 512), torch.float32)


def test_16_bit_weights_are_quantized_while_they_load(folders):
    wanted = {"quant_method": "fp6", "group_size": 64, "lm_head": True}
    online = engine(folders / "plain", quantization="fp6", hf_overrides={"quantization_config": wanted})
    packed = engine(folders / "packed")
    assert names(online).keys() == names(packed).keys()
    assert all(torch.equal(tensor, names(packed)[name]) for name, tensor in names(online).items())


def test_16_bit_weights_need_no_options(folders):
    found = names(engine(folders / "plain", quantization="fp6"))
    assert "model.layers.0.mlp.down_proj.weight_w2" in found
    assert "lm_head.weight" in found


def test_weights_of_one_layer_may_have_different_formats(folders, tmp_path):
    """vLLM multiplies by q, k and v at once: here by q, then by k, then by v."""
    formats = {"*.k_proj": "e3m2", "*.up_proj": "e2m2"}
    pack(folders / "plain", tmp_path / "packed", tmp_path / "dequantized", module_formats=formats)
    assert "model.layers.0.mlp.gate_up_proj.weight_w1_1" in names(engine(tmp_path / "packed"))
    assert tokens(tmp_path / "packed") == tokens(tmp_path / "dequantized")


def test_experts_stay_in_16_bits(tmp_path):
    make("mixtral", tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "packed", tmp_path / "dequantized")
    found = names(engine(tmp_path / "packed"))
    assert "model.layers.0.self_attn.o_proj.weight_w4" in found
    assert [name for name in found if "experts" in name and name.endswith("w13_weight")]
    assert tokens(tmp_path / "packed") == tokens(tmp_path / "dequantized")
    assert tokens(tmp_path / "plain", quantization="fp6") == tokens(tmp_path / "packed")


def test_tied_heads_stay_in_16_bits(tmp_path):
    make("llama", tmp_path / "plain", tie_word_embeddings=True)
    pack(tmp_path / "plain", tmp_path / "packed", tmp_path / "dequantized", skip=())
    assert "model.embed_tokens.weight" in names(engine(tmp_path / "packed"))
    assert tokens(tmp_path / "packed") == tokens(tmp_path / "dequantized")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, n: t.update({f"{n}_w4": t[f"{n}_w4"].float()}),
            "down_proj.weight_w4 is torch.float32 in the folder",
        ),
        (
            lambda t, n: t.update({f"{n}_w4": t[f"{n}_w4"][:, :-1].contiguous()}),
            r"weight_w4 is \[256, 255\].*256 columns",
        ),
        (
            lambda t, n: t.update({f"{n}_w2": t[f"{n}_w2"].repeat(2, 1)}),
            r"down_proj.weight_w2 is \[512, 128\].*256 rows",
        ),
        (lambda t, n: t.update({f"{n}_scale": t[f"{n}_scale"][:, :1].contiguous()}), r"scale is \[256, 1\].*8 columns"),
    ],
    ids=["dtype", "columns", "rows", "scale"],
)
def test_what_is_loaded_is_checked(folders, tmp_path, change, message):
    name = "model.layers.0.mlp.down_proj.weight"
    refused(copy(folders / "packed", tmp_path / "damaged", lambda tensors: change(tensors, name)), message)


def test_a_merged_weight_of_too_many_rows_is_refused(folders, tmp_path):
    """vLLM alone would take the first of them."""
    name = "model.layers.0.self_attn.k_proj.weight_w4"
    folder = copy(folders / "packed", tmp_path / "x", lambda t: t.update({name: t[name].repeat(2, 1)}))
    refused(folder, r"qkv_proj.weight_w4 is \[256, 128\] in the folder, needs 128 rows")


def test_folders_of_other_versions_and_half_packed_layers_are_refused(folders, tmp_path):
    refused(copy(folders / "packed", tmp_path / "newer", version=3), "has version 3, this fp6_compile reads 2")
    kept = ["model.layers.1.self_attn.v_proj"]
    folder = copy(folders / "packed", tmp_path / "half", modules_to_not_convert=kept)
    refused(folder, "v_proj is not packed and model.layers.1.self_attn.q_proj is, but vLLM multiplies by them at once")


def test_weights_without_values_are_refused(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    refused(
        tmp_path / "plain", "fp6: model.layers.1.mlp.down_proj: weight: 1 of 131072 values are NaN", quantization="fp6"
    )


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one(folders):
    assert tokens(folders / "packed", tensor_parallel_size=2) == tokens(folders / "packed")


def test_groups_that_two_ranks_would_cut_are_refused(tmp_path):
    """Two ranks have 256 of the 512 inputs of down_proj."""
    from fp6_compile.integrations.vllm.linear import PackedLinearMethod
    from fp6_compile.integrations.vllm.settings import Scheme

    method = PackedLinearMethod("down_proj", [Scheme("e2m3", 512)])
    with pytest.raises(
        ValueError, match="cuts the 512 inputs of down_proj into 256, which are not whole groups of 512"
    ):
        method.create_weights(torch.nn.Module(), 256, [64], 512, 64, torch.bfloat16, weight_loader=print)
