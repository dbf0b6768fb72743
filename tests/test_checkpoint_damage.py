"""Checkpoints that are damaged, or whose parts do not fit: load says what is wrong, and leaves the model as it was."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import CheckpointError
from fp6_compile.storage import safetensors as storage
from tests.support.checkpoints import INDEX, content, packed_tower, sign

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")


def _assert_refused(folder: Path, message: str) -> None:
    """load raises CheckpointError that matches, and leaves the model's tensors the same objects."""
    model = packed_tower(seed=1)
    before = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with pytest.raises(CheckpointError, match=message):
        fp6_compile.load(model, folder)
    assert {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())} == before


# Damage that hashes show: bits, lengths, files. Seeds are the test's parameters.


def _flip_a_bit(rng, files):
    data = bytearray(files[0].read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[0].write_bytes(data)


def _truncate(rng, files):
    files[0].write_bytes(files[0].read_bytes()[: rng.randrange(files[0].stat().st_size)])


def _append(rng, files):
    files[0].write_bytes(files[0].read_bytes() + rng.randbytes(rng.randrange(1, 99)))


def _overwrite_a_run(rng, files):
    data = bytearray(files[0].read_bytes())
    start, length = rng.randrange(len(data)), rng.randrange(1, 400)
    run = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    data[start : start + length] = run
    if bytes(data) == files[0].read_bytes():
        return _flip_a_bit(rng, files)
    files[0].write_bytes(data)
    return None


def _remove(rng, files):
    files[0].unlink()


def _exchange(rng, files):
    files[0].rename(files[0].with_suffix(".tmp"))
    files[1].rename(files[0])
    files[0].with_suffix(".tmp").rename(files[1])


def _cut_out(rng, files):
    data = files[0].read_bytes()
    start = rng.randrange(len(data) - 1)
    files[0].write_bytes(data[:start] + data[start + rng.randrange(1, 50) :])


DAMAGES = [_flip_a_bit, _truncate, _append, _overwrite_a_run, _remove, _exchange, _cut_out]


@pytest.mark.parametrize("seed", range(70))
def test_damage_is_noticed(seed, folder):
    """Each is an error, but for what means nothing to anyone: a letter of "total_size", say."""
    rng, before = random.Random(seed), content(folder)
    files = sorted(folder.iterdir())
    rng.shuffle(files)
    DAMAGES[seed % len(DAMAGES)](rng, files)
    try:
        after = content(folder)
    except CheckpointError:
        _assert_refused(folder, r"^fp6: .+")
    else:
        assert after == before


@pytest.mark.parametrize("seed", range(20))
def test_every_bit_of_a_tensor_counts(seed, folder):
    rng = random.Random(seed)
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[rng.randrange(8 + int.from_bytes(data[:8], "little"), len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    _assert_refused(folder, "is damaged: its SHA-256 is another")


# Damage that only its meaning shows: files are changed, and hashes made to fit.


def _edit(folder: Path, change) -> None:
    """Change (tensors, metadata) of the shard that has the packed weight, and sign."""
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.load_file(file)
        if "first.weight_w4" in tensors:
            said = json.loads(storage.entries(file)[1]["fp6"])
            change(tensors, said)
            safetensors.save_file(tensors, file, metadata={"fp6": said if isinstance(said, str) else json.dumps(said)})
    sign(folder)


def _tensor(name, value):
    return lambda folder: _edit(folder, lambda tensors, said: tensors.update({name: value(tensors[name])}))


def _about(**changes):
    return lambda folder: _edit(folder, lambda tensors, said: said["weights"]["first.weight"].update(changes))


def _said(**changes):
    return lambda folder: _edit(folder, lambda tensors, said: said.update(changes))


def _at(value):
    def change(scale):
        scale[7, 1] = value
        return scale

    return change


def _twice(folder):
    """The buffers' file has a tensor that a shard has, too."""
    shard, file = (next(folder.glob(glob)) for glob in ("model-00001*.safetensors", "fp6-buffers-*"))
    name, value = next(iter(safetensors.load_file(shard).items()))
    tensors, metadata = safetensors.load_file(file), storage.entries(file)[1]
    safetensors.save_file({**tensors, name: value}, file, metadata)
    sign(folder)


def _unsigned(folder):
    for file in folder.glob("model-*.safetensors"):
        file.write_bytes(file.read_bytes().replace(b"e2m3", b"e3m2"))


def _exchanged(index):
    """The first tensor and the last change places."""
    where = index["weight_map"]
    first, *_, last = sorted(where, key=where.get)
    where[first], where[last] = where[last], where[first]


def _metadata(text):
    def change(folder):
        shard = next(folder.glob("model-*.safetensors"))
        safetensors.save_file(safetensors.load_file(shard), shard, metadata=text)
        sign(folder)

    return change


def _link_out(folder):
    shard = next(folder.glob("model-*.safetensors"))
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


MEANINGS = {
    "newer version": (_said(version=3), "safetensors is of version 3, this .* reads versions 1 to 2"),
    "older version": (_said(version=0), "safetensors is of version 0, .* quantize the model anew"),
    "version 1 among others": (_said(version=1), "safetensors is of version 1, in a folder of version 2"),
    "no version": (lambda f: _edit(f, lambda t, s: s.pop("version")), "safetensors gives no version"),
    "version is text": (_said(version="2"), "safetensors gives no version"),
    "layout of a device": (_said(layout="cpu.v1"), "planes in layout 'cpu.v1', .* reads 'planes.v1'"),
    "old layout": (_said(layout="planes.v0"), "planes in layout 'planes.v0'"),
    "no weight_map": (lambda f: sign(f, lambda i: i.pop("weight_map")), "index.json has no table 'weight_map'"),
    "weight_map is a list": (lambda f: sign(f, lambda i: i.update(weight_map=[])), "has no table 'weight_map'"),
    "a file is a number": (lambda f: sign(f, lambda i: i["weight_map"].update(x=3)), "no table 'weight_map' of file names"),
    "shard elsewhere": (lambda f: sign(f, lambda i: i["weight_map"].update({"first.bias": "../x"})),
        r"\.\./x, which model.safetensors.index.json names, is missing"),
    "buffers elsewhere": (lambda f: sign(f, lambda i: i["metadata"].update(fp6_buffers="../x")), r"\.\./x, .* is missing"),
    "buffers are a number": (lambda f: sign(f, lambda i: i["metadata"].update(fp6_buffers=3)), "3, .* is missing"),
    "a tensor in another shard": (lambda f: sign(f, _exchanged), "index.json and its files disagree on where"),
    "a tensor that no shard has": (lambda f: sign(f, lambda i: i["weight_map"].update(x=min(i["weight_map"].values()))),
        "index.json and its files disagree on where x is"),
    "shard left out": (lambda f: sign(f, lambda i: i.update(weight_map={n: file for n, file in i["weight_map"].items()
        if file != min(i["weight_map"].values())})), "is not of this model: it lacks"),
    "a tensor twice": (_twice, "is in fp6-buffers-.* and in another shard"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), "index.json has no table 'weight_map'"),
    "index is empty": (lambda f: (f / INDEX).write_text(""), "index.json is not JSON"),
    "index is no text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe{"), "index.json is not JSON"),
    "index is a folder": (lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir()), "is not a checkpoint: cannot read"),
    "metadata not signed": (_unsigned, "the metadata of .* is damaged: its SHA-256"),
    "no hashes": (_said(sha256=[]), "has no table 'sha256'"),
    "no metadata": (_metadata(None), "safetensors gives no version"),
    "metadata is not JSON": (_metadata({"fp6": "{"}), "the metadata of .* is not JSON"),
    "metadata is a number": (_metadata({"fp6": "3"}), "safetensors gives no version"),
    "no weights": (_said(weights=3), "has no table 'weights'"),
    "no tied": (_said(tied=None), "has no table 'tied'"),
    "tied to nothing": (_said(tied={"second.weight": "third.weight"}),
        "second.weight is tied to 'third.weight', which is not"),
    "tied to itself": (_said(tied={"first.weight": "first.weight"}), "first.weight is tied to 'first.weight'"),
    "unknown format": (_about(format="e9m9"), "first.weight: not a packed weight .* got 'e9m9'"),
    "format is a number": (_about(format=6), "first.weight: not a packed weight"),
    "planes of version 1": (_about(format="e2m3", planes=["w4", "w2"]), "first.weight: not a packed weight .* expected"),
    "group size": (_about(group_size=32), r"first.weight_scale is F32 of shape \[256, 4\], expected .* \[256, 8\]"),
    "group size of zero": (_about(group_size=0), "not positive integers"),
    "group size is text": (_about(group_size="64"), "first.weight: not a packed weight"),
    "group size is true": (_about(group_size=True), "not positive integers"),
    "shape": (_about(shape=[256, 260]), "first.weight_w4 is U8"),
    "shape of one": (_about(shape=[256]), "first.weight: not a packed weight"),
    "shape is negative": (_about(shape=[-256, 256]), "not positive integers"),
    "dtype of the weight": (_about(dtype="int8"), "first.weight: not a packed weight"),
    "an extra key": (_about(zero_point=3), "first.weight: not a packed weight .* expected"),
    "a plane is missing": (lambda f: _edit(f, lambda t, s: t.pop("first.weight_w2")), "first.weight_w2 is missing"),
    "scales are missing": (lambda f: _edit(f, lambda t, s: t.pop("first.weight_scale")), "first.weight_scale is missing"),
    "a bias is missing": (lambda f: _edit(f, lambda t, s: t.pop("first.bias")), r"lacks 1 of its tensors \(first.bias\)"),
    "a tensor too many": (lambda f: _edit(f, lambda t, s: t.update(x=torch.zeros(1))), r"has 1 others \(x\)"),
    "a plane too many": (lambda f: _edit(f, lambda t, s: t.update({"first.weight_w1": torch.zeros(1)})), "has 1 others"),
    "a weight forgotten": (_said(weights={}, tied={}), "lacks 2 of its tensors .* has 3 others"),
    "dtype of a plane": (_tensor("first.weight_w4", lambda t: t.view(torch.int8)), "first.weight_w4 is I8 of"),
    "shape of a plane": (_tensor("first.weight_w2", lambda t: t[:-1].clone()), "first.weight_w2 is U8 of"),
    "dtype of the scales": (_tensor("first.weight_scale", lambda t: t.half()), "first.weight_scale is F16 of"),
    "scales transposed": (_tensor("first.weight_scale", lambda t: t.T.contiguous()), "first.weight_scale is F32 of"),
    "a scale is NaN": (_tensor("first.weight_scale", _at(torch.nan)), "first.weight_scale has values that are NaN"),
    "a scale is infinite": (_tensor("first.weight_scale", _at(torch.inf)),
        "first.weight_scale has values that are NaN, inf"),
    "a scale is zero": (_tensor("first.weight_scale", _at(0.0)), "first.weight_scale has values .* not positive"),
    "a scale is negative": (_tensor("first.weight_scale", _at(-1.0)), "first.weight_scale has values .* not positive"),
    "shape of a bias": (_tensor("first.bias", lambda t: t[:-1].clone()),
        r"first.bias is \[256\] in the model and \[255\] in"),
    "integers for a bias": (_tensor("first.bias", lambda t: t.view(torch.int16)),
        "first.bias is torch.float16 in the model and I16 in"),
    "eight bits for a bias": (_tensor("first.bias", lambda t: t.to(torch.float8_e4m3fn)),
        "first.bias is torch.float16 in the model and F8_E4M3 in"),
    "tied to a list": (_said(tied={"second.weight": ["first.weight"]}), "second.weight is tied to .*, which is not there"),
    "a link that leads out": (_link_out, "which model.safetensors.index.json names, is missing: it is outside the folder"),
    "dtype unknown": (_tensor("first.bias", lambda t: t.view(torch.uint16)), "first.bias is of dtype U16"),
}  # fmt: skip


@pytest.mark.parametrize("what", MEANINGS)
def test_meaning_is_checked(what, folder):
    change, message = MEANINGS[what]
    change(folder)
    _assert_refused(folder, message)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_headers_that_are_signed(seed, folder):
    """Bits of a shard's header are flipped and hashes made to fit: an error, or a difference that means nothing."""
    rng, before = random.Random(1000 + seed), content(folder)
    shard = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    shard.write_bytes(data)
    sign(folder)
    try:
        after = content(folder)
    except CheckpointError:
        return
    assert after == before


def test_not_a_checkpoint(tmp_path):
    _assert_refused(tmp_path, "is not a checkpoint: it has no model.safetensors and no model.safetensors.index.json")
    _assert_refused(
        tmp_path / "nowhere", "is not a checkpoint: it has no model.safetensors and no model.safetensors.index.json"
    )


def test_another_model(saved):
    with pytest.raises(CheckpointError, match=r"not of this model: it lacks 2 of its tensors \(bias, weight\) and has"):
        fp6_compile.load(nn.Linear(256, 256), saved)
