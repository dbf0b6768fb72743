"""Folders of version 1 are read, what `save` replaces, and what it does not touch."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import CheckpointError
from tests.support.checkpoints import INDEX, digest, empty_tower, packed_tower

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")

# Written by `save` of fp6_compile 0.1.
VERSION_1 = Path(__file__).parent / "version1"


class Old(nn.Module):
    """The model in VERSION_1: `first` in E2M3 and groups of 64, `second` in E3M2, each output with its scale."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 128)
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 130, bias=False)
        self.head = nn.Linear(128, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.zeros(4), persistent=False)


def _old() -> Old:
    with torch.device("meta"):
        return Old().half()


def test_version_1_is_read():
    model, tensors = _old(), {}
    for file in VERSION_1.glob("*.safetensors"):
        tensors |= safetensors.load_file(file)
    fp6_compile.load(model, VERSION_1)
    for name, how in {"first": ("e2m3", 64), "second": ("e3m2", None)}.items():
        packed = model.get_submodule(name).weight.repack("planes.v1")
        assert (packed.spec.format, packed.spec.group_size) == how
        stored = [tensors[f"{name}.weight.{part}"] for part in ("w4", "w2", "scale")]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(packed.tensors, stored, strict=True))
    assert torch.equal(model.embed.weight, tensors["embed.weight"])
    assert torch.equal(model.first.bias, tensors["first.bias"])
    assert model.head.weight is model.embed.weight
    assert model.frequencies.tolist() == [0, 1, 2, 3]


def test_version_1_is_replaced_as_a_whole(tmp_path):
    """Saved again, a folder has the same weights, and nothing of version 1 is left."""
    folder = shutil.copytree(VERSION_1, tmp_path / "folder")
    model, again = _old(), _old()
    fp6_compile.load(model, folder)
    fp6_compile.save(model, folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith("fp6-0") or path.name == "fp6.json"]
    fp6_compile.load(again, folder)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["fp6.json", "fp6-00001*", "fp6-00002*"])
@pytest.mark.parametrize("seed", range(3))
def test_damage_of_version_1_is_noticed(name, seed, tmp_path):
    folder = shutil.copytree(VERSION_1, tmp_path / "folder")
    file = next(folder.glob(name))
    data = bytearray(file.read_bytes())
    data[(seed * len(data)) // 3 + 7] ^= 1 << seed
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged|is not JSON|has no table|no version"):
        fp6_compile.load(_old(), folder)


def test_a_bias_of_integers_in_version_1_changes_nothing(tmp_path):
    """With hashes that fit: only its dtype is wrong."""
    folder = shutil.copytree(VERSION_1, tmp_path / "folder")
    index = json.loads((folder / "fp6.json").read_text())
    del index["sha256"]
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as opened:
            said = opened.metadata()
        tensors = safetensors.load_file(file)
        if "first.bias" in tensors:
            tensors["first.bias"] = tensors["first.bias"].view(torch.int16)
        safetensors.save_file(tensors, file, said)
        data = file.read_bytes()
        index["shards"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "fp6.json").write_text(json.dumps({**index, "sha256": digest(index)}))
    model = Old().half()
    before = [(name, id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()]
    with pytest.raises(CheckpointError, match="first.bias is torch.float16 in the model and I16 in"):
        fp6_compile.load(model, folder)
    for (name, which, value), tensor in zip(before, model.state_dict(keep_vars=True).values(), strict=True):
        assert (id(tensor), torch.equal(tensor, value)) == (which, True), name


# Hugging Face's names.


def test_one_file_without_an_index(saved, tmp_path):
    """As `save_pretrained` writes small models, without buffers that are not persistent: a model has those already."""
    model = packed_tower()
    fp6_compile.save(model, tmp_path / "one")
    (shard,) = (tmp_path / "one").glob("model-*.safetensors")
    (tmp_path / "two").mkdir()
    shutil.copy(shard, tmp_path / "two" / "model.safetensors")
    other = packed_tower(seed=1)
    frequencies = other.frequencies
    fp6_compile.load(other, tmp_path / "two")
    assert other.frequencies is frequencies
    assert torch.equal(other.first.weight.codes(), model.first.weight.codes())
    with pytest.raises(CheckpointError, match=r"lacks 1 of its tensors \(frequencies\)"):
        fp6_compile.load(empty_tower(), tmp_path / "two")


def test_a_single_file_is_replaced(saved, tmp_path):
    """model.safetensors, which readers prefer to an index, must not outlive the model it belongs to."""
    fp6_compile.save(packed_tower(), tmp_path)
    (shard,) = tmp_path.glob("model-*.safetensors")
    shard.rename(tmp_path / "model.safetensors")
    (tmp_path / INDEX).unlink()
    new = packed_tower(seed=1)
    fp6_compile.save(new, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    model = empty_tower()
    fp6_compile.load(model, tmp_path)
    assert torch.equal(model.first.weight.codes(), new.first.weight.codes())


@pytest.mark.parametrize("indexed", [False, True])
def test_weights_of_others_are_not_replaced(indexed, saved, tmp_path):
    names = ["model-00001-of-00001.safetensors", INDEX] if indexed else ["model.safetensors"]
    safetensors.save_file({"weight": torch.zeros(3)}, tmp_path / names[0], {"format": "pt"})
    if indexed:
        (tmp_path / INDEX).write_text('{"weight_map": {"weight": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(ValueError, match="holds other weights; remove them or save elsewhere .*gives no version"):
        fp6_compile.save(packed_tower(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_tie_that_the_folder_does_not_tell_is_the_models(tmp_path):
    """transformers stores a tied weight once, under a name of its choice."""
    model = packed_tower()
    fp6_compile.save(model, tmp_path / "one")
    (shard,) = (tmp_path / "one").glob("model-*.safetensors")
    tensors = safetensors.load_file(shard)
    with safetensors.safe_open(shard, "pt") as opened:
        said = opened.metadata()["fp6"]
    assert '"head.weight": "embed.weight"' in said
    assert "head.weight" not in tensors
    other = packed_tower(seed=1)
    fp6_compile.load(other, tmp_path / "one")
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.embed.weight)
