"""The command line on a small transformers model, as a new user would: quantize, inspect, verify, load, generate."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import fp6_compile
from fp6_compile import cli
from tests.support.checkpoints import INDEX, mx_bytes
from tests.support.graphs import explaining_here

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")

SIZES = {
    **{"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 300},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "model"
    assert (
        cli.main(["quantize", str(source), str(folder), "--format", "e2m3", "--group-size", "64", "--skip", "*.o_proj"])
        == 0
    )
    return folder


def _load(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    fp6_compile.load(model, folder)
    return model


def test_quantize_keeps_the_other_files(source, packed):
    names = {path.name for path in packed.iterdir() if path.suffix != ".safetensors"}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", INDEX}
    config = json.loads((packed / "config.json").read_text())
    assert config.pop("quantization_config") == {
        **{"quant_method": "fp6", "version": 2, "format": "e2m3", "group_size": 64},
        "modules_to_not_convert": ["model.layers.0.self_attn.o_proj", "lm_head"],
        "module_formats": {},
    }
    assert config == json.loads((source / "config.json").read_text())


def test_same_as_quantizing_in_memory(source, packed):
    """Streamed from the folder or quantized in memory: the same tokens and the same bits."""
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    fp6_compile.quantize_(original, format="e2m3", group_size=64, skip=["*.o_proj"])
    model, ids = _load(packed), torch.randint(2, 300, (1, 7))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    how = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), original.generate(ids, **how))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_inspect(packed, capsys):
    assert cli.main(["inspect", str(packed)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0].split() == ["weight", "shape", "format", "group", "dtype", "bytes", "bits"]
    assert text[1].split() == [
        "model.layers.0.self_attn.q_proj",
        "256x256",
        "e2m3",
        "64",
        "bfloat16",
        "53.2",
        "KB",
        "6.50",
    ]
    assert text[-1] == "6 packed weights, 852 KB -> 346 KB; 7 other tensors, 286 KB; 1 tied"
    assert not any("o_proj" in line for line in text)


def test_verify(source, packed, capsys):
    assert cli.main(["verify", str(packed)]) == 0
    assert cli.main(["verify", str(packed), "--against", str(source)]) == 0
    text = capsys.readouterr().out
    assert "all match" in text
    assert float(text.splitlines()[3].split()[1]) > 30, "decibels of Gaussian weights in E2M3"


def test_verify_finds_another_source(source, packed, tmp_path, capsys):
    tensors = safetensors.load_file(source / "model.safetensors")
    tensors["model.norm.weight"] += 1
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 3
    del tensors["model.layers.0.mlp.gate_proj.weight"]
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    assert cli.main(["verify", str(packed), "--against", str(tmp_path)]) == 1
    found = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert found["model.norm"].endswith("differs")
    assert found["model.layers.0.mlp.up_proj"].endswith("codes are not the nearest")
    assert found["model.layers.0.mlp.gate_proj"].endswith("not in SRC")
    assert "3 differ" in found["3"]


def test_damaged_folder(packed, tmp_path, capsys):
    shutil.copy(packed / INDEX, tmp_path)
    for command in ("inspect", "verify"):
        assert cli.main([command, str(tmp_path)]) == 1
        assert capsys.readouterr().err.startswith("fp6: model-00001-of-00001-")


def test_mxfp6_folder_is_imported(source, tmp_path, capsys):
    tensors = safetensors.load_file(source / "model.safetensors")
    folder = tmp_path / "quark"
    folder.mkdir()
    name = "model.layers.0.mlp.up_proj.weight"
    codes = torch.randint(0, 64, (384, 256), dtype=torch.uint8)
    tensors |= {name: mx_bytes(codes), f"{name}_scale": torch.full((384, 8), 120, dtype=torch.uint8)}
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    weight = {"dtype": "fp6_e3m2", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    config["quantization_config"] = {"quant_method": "quark", "global_quant_config": {"weight": weight}}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["quantize", str(folder), str(tmp_path / "ours")]) == 0
    assert "1 of 1 linears in e3m2" in capsys.readouterr().out
    model = _load(tmp_path / "ours")
    torch.testing.assert_close(model.get_parameter(name).codes(), codes, rtol=0, atol=0)


def test_usage_errors(source, packed, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchModel"]}')
    target = str(tmp_path / "out")
    for arguments, message in {
        ("quantize", str(tmp_path), target): "has no config.json: not a transformers model folder",
        ("quantize", str(source), str(source)): "DST is SRC",
        ("quantize", str(source), str(tmp_path / "full")): "is there already and not an empty folder",
        ("quantize", str(tmp_path / "odd"), target): "architecture 'NoSuchModel' is not in transformers",
        ("quantize", str(source), target, "--group-size", "0"): "option 'group_size' got 0",
        ("quantize", str(source), target, "--skip", "*"): "no linear was packed, so nothing is saved",
        ("verify", str(packed), "--against", target): "no safetensors files in it",
    }.items():
        assert cli.main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "file").read_text() == "mine"
    for arguments in ([], ["quantize"], ["quantize", "a", "b", "--format", "e9m9"], ["nonsense"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2


def test_help_and_version(capsys):
    for arguments in (["--help"], ["quantize", "--help"], ["inspect", "-h"], ["verify", "-h"], ["--version"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the 16-bit model need not fit in memory" in text
    assert f"fp6_compile {fp6_compile.__version__}" in text


def test_entry_point():
    code = "import sys; from fp6_compile.cli import main; sys.exit(main(['inspect', 'nowhere']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "fp6: nowhere is not a checkpoint: it has no model.safetensors and no model.safetensors.index.json\n",
    )


@pytest.mark.slow
def test_explain(source, packed, tmp_path, capsys):
    """Of a folder as it is, and packed; with a page and as JSON."""
    page = tmp_path / "page.html"
    with explaining_here():
        assert cli.main(["explain", str(source), "--device", "4090", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "on RTX 4090: nothing was run" in out
    assert "8 of 8 quantized" in out
    assert "hold: all of the call" in out
    assert page.read_text().startswith("<!doctype html>")
    assert cli.main(["explain", str(packed), "--device", "4090", "--context", "256", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [x["format"] for x in data["linears"]] == ["e2m3"] * 8
    assert 2 * 256 * 2 * 64 * 2 <= data["traffic"]["inputs"] <= 2 * 256 * 2 * 64 * 2 + 100
    assert cli.main(["explain", str(source), "--device", "4091"]) == 2
    assert "known names are" in capsys.readouterr().err


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A folder that brings code for its configuration and its model; what it does when it runs is leave a mark."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nothing is asked"))
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "modeling_x.py").write_text(f"""
from transformers import LlamaConfig, LlamaForCausalLM
open({str(tmp_path / "mark")!r}, "w").close()

class XConfig(LlamaConfig):
    model_type = "x"

class XForCausalLM(LlamaForCausalLM):
    config_class = XConfig
""")
    auto = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    config = {**SIZES, "model_type": "x", "architectures": ["XForCausalLM"], "auto_map": auto, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16()
    safetensors.save_model(weights, folder / "model.safetensors")
    return folder


def test_code_of_a_folder_is_not_run_unless_told(stranger, tmp_path, capsys):
    for arguments in (
        ["quantize", str(stranger), str(tmp_path / "out")],
        ["explain", str(stranger), "--device", "4090"],
    ):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err == (
            f"fp6: {stranger} needs Python code that it brings along; --trust-remote-code runs it, if you trust it\n"
        )
        assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()
    assert cli.main(["quantize", str(stranger), str(tmp_path / "out"), "--trust-remote-code"]) == 0
    assert (tmp_path / "mark").exists()
    assert cli.main(["verify", str(tmp_path / "out"), "--against", str(stranger)]) == 0


def test_code_of_a_folder_for_a_known_configuration(stranger, tmp_path, capsys):
    """The configuration is transformers' own, the model is not."""
    config = json.loads((stranger / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": config["auto_map"]["AutoModelForCausalLM"]}
    (stranger / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert cli.main(["explain", str(stranger)]) == 2
    assert "needs Python code that it brings along; --trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_benchmarks_do_not_run_code_of_a_folder(stranger, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    from benchmarks.accuracy import __main__ as accuracy
    from benchmarks.decode import __main__ as decode

    (tmp_path / "text").write_text("text")
    for main, arguments in ((decode.main, []), (accuracy.main, ["--text", str(tmp_path / "text")])):
        with pytest.raises(SystemExit) as exit:
            main(["--model", str(stranger), *arguments])
        assert exit.value.code == 2
        assert f"--model: {stranger} needs Python code that it brings along; --trust-rem" in capsys.readouterr().err
        assert not (tmp_path / "mark").exists()


CONFIGS = {
    "deep": ("[" * 99_999, "config.json is not JSON"),
    "twice": ('{"model_type": "llama", "model_type": "llama"}', "config.json is not JSON: it has 'model_type' twice"),
    "no model": (
        '{"model_type": "llama", "architectures": ["AutoTokenizer"]}',
        "'AutoTokenizer' is not in transformers",
    ),
    "architectures": ('{"model_type": "llama", "architectures": {"a": 1}}', "architecture"),
    "unknown": ('{"model_type": "nonsense"}', "transformers' AutoConfig cannot read it"),
    "sizes": (
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": -1}',
        "The hidden size (-1) is",
    ),
    "a list": ("[]", "AutoConfig cannot read it"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_odd_configurations(what, tmp_path, capsys):
    text, message = CONFIGS[what]
    (tmp_path / "config.json").write_text(text)
    assert cli.main(["explain", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_fp8_folder(source, tmp_path, capsys):
    """With its scales, or not at all; DST says nothing of FP8 any more."""
    folder, out = tmp_path / "fp8", tmp_path / "out"
    folder.mkdir()
    tensors, true = safetensors.load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        codes, scale = tensors[name].to(torch.float8_e4m3fn), torch.rand(-(-tensors[name].shape[0] // 128), 2) + 0.5
        if tensors[name].shape[1] != 256:
            scale = torch.rand(2, 3) + 0.5
        each = scale.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)
        true[name] = codes.float() * each
        tensors |= {name: codes, f"{name}_scale_inv": scale}
    safetensors.save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    for method, code in (("nonsense", 2), ("fp8", 0)):
        quantization = {"quant_method": method, "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        assert cli.main(["quantize", str(folder), str(out)]) == code
        assert ("quant_method 'nonsense'" in capsys.readouterr().err) == (code == 2)
        assert out.exists() == (code == 0)
    written = json.loads((out / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "fp6"
    assert written == config
    model = _load(out)
    for name, value in true.items():
        expected = fp6_compile.PackedTensor.quantize(value, dtype=torch.bfloat16)
        assert torch.equal(model.get_parameter(name), expected)
    assert cli.main(["verify", str(out), "--against", str(folder)]) == 0


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def interrupt(model, folder):
        assert (folder / "tokenizer.json").exists()
        raise KeyboardInterrupt

    for is_there in (False, True):
        if is_there:
            out.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(cli.commands, "save", interrupt)
            assert cli.main(["quantize", str(source), str(out)]) == 130
        assert capsys.readouterr().err == "fp6: interrupted\n"
        assert out.exists() == is_there
    assert list(out.iterdir()) == []
    # What a kill leaves: the mark, and some files.
    (out / ".fp6-compile-unfinished").touch()
    (out / "model-00001-of-00001.safetensors.partial").write_text("cut off")
    (out / "of_another_source.json").write_text("{}")
    assert cli.main(["quantize", str(source), str(out)]) == 0
    names = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", INDEX}
    assert cli.main(["verify", str(out), "--against", str(source)]) == 0


def test_links_that_lead_out_are_not_copied(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "in")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in" / "merges.txt").symlink_to(tmp_path / "secret")
    assert cli.main(["quantize", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "merges.txt: it is outside the folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fp6_compile.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fp6_compile ")
