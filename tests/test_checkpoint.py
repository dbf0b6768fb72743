"""save and load: round trips, everything that can be wrong with a folder, and saves that are killed."""

import contextlib
import copy
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import CheckpointError, PackedTensor
from fp6_compile.checkpoint import manifest
from fp6_compile.packed.low_rank import LowRankLinear, grow
from fp6_compile.storage import safetensors as storage
from tests.test_model import Tower

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")

TOKENS = torch.tensor([[3, 4, 5]])


def _packed_tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    model = Tower().half().eval()
    fp6_compile.quantize_(model, group_size=64)
    return model


def _empty_tower() -> Tower:
    with torch.device("meta"):
        return Tower().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a packed model in two shards."""
    folder = tmp_path_factory.mktemp("saved")
    fp6_compile.save(_packed_tower(), folder, shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def _assert_refused(folder: Path, message: str) -> None:
    """load raises CheckpointError that matches, and leaves the model's tensors the same objects."""
    model = _packed_tower(seed=1)
    before = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with pytest.raises(CheckpointError, match=message):
        fp6_compile.load(model, folder)
    assert {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())} == before


@pytest.mark.parametrize("make", [_empty_tower, lambda: _packed_tower(1), Tower], ids=["meta", "packed", "float32"])
def test_round_trip(make, saved):
    original, model = _packed_tower(), make().eval()
    report = fp6_compile.load(model, saved)
    assert [(line.name, line.shape) for line in report.quantized] == [("first", (256, 256))]
    for (name, theirs), (same, mine) in zip(original.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == same
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    assert model.first.weight.spec == original.first.weight.spec
    assert torch.equal(model.frequencies, original.frequencies), "buffers that are not persistent come along"
    assert model.head.weight is model.embed.weight
    assert model.second.weight is model.first.weight
    assert torch.equal(model(TOKENS), original(TOKENS))


def test_library_reads_what_is_written(saved):
    tensors = {}
    for file in saved.glob("*.safetensors"):
        tensors |= safetensors.load_file(file)
    original = _packed_tower()
    planes = original.first.weight.repack("planes.v1")
    stored = (tensors["first.weight.w4"], tensors["first.weight.w2"], tensors["first.weight.scale"])
    torch.testing.assert_close(stored, (*planes.planes, planes.scale), rtol=0, atol=0)
    torch.testing.assert_close(tensors["embed.weight"], original.embed.weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", storage.DTYPES.values(), ids=storage.DTYPES)
def test_every_dtype_and_odd_shapes(dtype, tmp_path):
    model = nn.Module()
    for i, shape in enumerate([(), (0, 3), (5,), (2, 3, 4)]):
        value = torch.arange(torch.Size(shape).numel()).reshape(shape)
        model.register_buffer(f"b{i}", value.to(dtype))
    fp6_compile.save(model, tmp_path)
    other = copy.deepcopy(model).to("meta")
    fp6_compile.load(other, tmp_path)
    for mine, theirs in zip(other.buffers(), model.buffers(), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))


def test_fresh_process_gives_the_same_bits(saved, tmp_path):
    """Quantize, save; in a new process load, compile, run."""
    code = f"""
import torch, fp6_compile
from tests.test_model import Tower
with torch.device("meta"):
    model = Tower().eval()
fp6_compile.load(model, {str(saved)!r})
tokens = torch.tensor([[3, 4, 5]])
with torch.no_grad():
    torch.save([model(tokens), torch.compile(model, backend="fp6", fullgraph=True)(tokens)], {str(tmp_path / "out.pt")!r})
"""
    model = _packed_tower()
    with torch.no_grad():
        expected = [model(TOKENS), torch.compile(model, backend="fp6", fullgraph=True)(TOKENS)]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    for mine, theirs in zip(torch.load(tmp_path / "out.pt"), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = _packed_tower()
    fp6_compile.save(torch.compile(model, backend="eager"), tmp_path)
    other = _empty_tower()
    fp6_compile.load(torch.compile(other, backend="eager"), tmp_path)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_saving_again_replaces_and_keeps_other_files(saved, folder):
    (folder / "config.json").write_text("{}")
    (folder / "fp6-00001-of-00009-0.safetensors").write_text("of a save that was killed")
    other = _packed_tower(seed=1)
    fp6_compile.save(other, folder)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors"]
    model = _empty_tower()
    fp6_compile.load(model, folder)
    assert torch.equal(model(TOKENS), other(TOKENS))


class Extra(nn.Linear):
    def get_extra_state(self):
        return 3


def _with_dtensor_like(model):
    class Strange(torch.Tensor):
        pass

    model.weight = nn.Parameter(model.weight.detach().as_subclass(Strange), requires_grad=False)
    return model


UNSAVABLE = {
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "weight is on the meta device: it has no values to save"),
    "subclass": (lambda: _with_dtensor_like(nn.Linear(4, 4)), "weight is a Strange; make it an ordinary tensor first"),
    "extra state": (lambda: nn.Sequential(Extra(4, 4)), r"0 \(Extra\) has extra state"),
    "dtype": (
        lambda: nn.ParameterDict({"z": torch.zeros(3, dtype=torch.complex64)}),
        "z: torch.complex64 has no place",
    ),
}


@pytest.mark.parametrize("what", UNSAVABLE)
def test_unsavable_leaves_the_folder_as_it_was(what, folder, saved):
    make, message = UNSAVABLE[what]
    with pytest.raises(ValueError, match=message):
        fp6_compile.save(make(), folder)
    fp6_compile.load(_empty_tower(), folder)


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
    rng = random.Random(seed)
    files = sorted(folder.iterdir())
    rng.shuffle(files)
    DAMAGES[seed % len(DAMAGES)](rng, files)
    _assert_refused(folder, r"^fp6: .+")


# Damage that only its meaning shows: files are changed, and hashes made to fit.


def _sign(folder: Path, change=lambda index: None, *, files: list[Path] | None = None) -> None:
    shards = sorted(folder.glob("*.safetensors")) if files is None else files
    about = {s.name: {"bytes": s.stat().st_size, "sha256": storage.sha256(s)} for s in shards}
    index = json.loads(manifest.index_text(about))
    del index["sha256"]
    change(index)
    (folder / "fp6.json").write_text(json.dumps({**index, "sha256": manifest._digest(index)}))


def _edit(folder: Path, change) -> None:
    """Change (tensors, metadata) of the shard that has the packed weight, and sign."""
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.load_file(file)
        if "first.weight.w4" in tensors:
            said = json.loads(storage.entries(file)[1]["fp6"])
            change(tensors, said)
            safetensors.save_file(tensors, file, metadata={"fp6": said if isinstance(said, str) else json.dumps(said)})
    _sign(folder)


def _tensor(name, value):
    return lambda folder: _edit(folder, lambda tensors, said: tensors.update({name: value(tensors[name])}))


def _about(**changes):
    return lambda folder: _edit(folder, lambda tensors, said: said["weights"]["first.weight"].update(changes))


def _said(**changes):
    return lambda folder: _edit(folder, lambda tensors, said: said.update(changes))


def _at(value):
    def change(scale):
        scale[1, 7] = value
        return scale

    return change


def _copy_shard(folder):
    shard = next(folder.glob("*.safetensors"))
    shutil.copy(shard, folder / "fp6-again.safetensors")
    _sign(folder)


def _metadata(text):
    def change(folder):
        shard = next(folder.glob("*.safetensors"))
        safetensors.save_file(safetensors.load_file(shard), shard, metadata=text)
        _sign(folder)

    return change


def _link_out(folder):
    shard = next(folder.glob("*.safetensors"))
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


MEANINGS = {
    "newer version": (lambda f: _sign(f, lambda i: i.update(version=2)),
        "fp6.json is of version 2, this .* reads version 1"),
    "older version": (lambda f: _sign(f, lambda i: i.update(version=0)),
        "fp6.json is of version 0, .* quantize the model anew"),
    "no version": (lambda f: _sign(f, lambda i: i.pop("version")), "fp6.json gives no version"),
    "version is text": (lambda f: _sign(f, lambda i: i.update(version="1")), "fp6.json gives no version"),
    "layout of a device": (lambda f: _sign(f, lambda i: i.update(layout="cpu.v1")),
        "planes in layout 'cpu.v1', .* reads 'planes.v1'"),
    "old layout": (lambda f: _sign(f, lambda i: i.update(layout="planes.v0")), "planes in layout 'planes.v0'"),
    "old layout of a shard": (_said(layout="planes.v0"), "safetensors has planes in layout 'planes.v0'"),
    "version of a shard": (_said(version=9), "safetensors is of version 9"),
    "no shards": (lambda f: _sign(f, lambda i: i.pop("shards")), "fp6.json has no table 'shards'"),
    "shards are a list": (lambda f: _sign(f, lambda i: i.update(shards=[])), "fp6.json has no table 'shards'"),
    "a shard is text": (lambda f: _sign(f, lambda i: i["shards"].update(dict.fromkeys(i["shards"], "x"))),
        "fp6.json says x"),
    "shard elsewhere": (lambda f: _sign(f, lambda i: i["shards"].update({"../x": {}})),
        r"\.\./x, which fp6.json names, is missing"),
    "shard left out": (lambda f: _sign(f, files=sorted(f.glob("*.safe*"))[:1]), "is not of this model: it lacks"),
    "shard twice": (_copy_shard, "is in fp6-.* and in another shard"),
    "index is a list": (lambda f: (f / "fp6.json").write_text("[]"), "fp6.json gives no version"),
    "index is empty": (lambda f: (f / "fp6.json").write_text(""), "fp6.json is not JSON"),
    "index is no text": (lambda f: (f / "fp6.json").write_bytes(b"\xff\xfe{"), "fp6.json is not JSON"),
    "index is a folder": (lambda f: ((f / "fp6.json").unlink(), (f / "fp6.json").mkdir()),
        "is not a checkpoint: cannot read"),
    "not signed": (lambda f: (f / "fp6.json").write_text((f / "fp6.json").read_text().replace('"bytes": 2', '"bytes": 3')),
        "SHA-256"),
    "no metadata": (_metadata(None), "safetensors gives no version"),
    "metadata is not JSON": (_metadata({"fp6": "{"}), "the metadata of .* is not JSON"),
    "metadata is a number": (_metadata({"fp6": "3"}), "safetensors gives no version"),
    "no weights": (_said(weights=3), "has no table 'weights'"),
    "no tied": (_said(tied=None), "has no table 'tied'"),
    "tied to nothing": (_said(tied={"second.weight": "third.weight"}),
        "second.weight is tied to 'third.weight', which is not"),
    "tied to itself": (_said(tied={"first.weight": "first.weight"}), "first.weight is tied to 'first.weight'"),
    "tie is lost": (_said(tied={}), "lacks 2 of its tensors"),
    "unknown format": (_about(format="e9m9"), "first.weight: not a packed weight .* got 'e9m9'"),
    "format is a number": (_about(format=6), "first.weight: not a packed weight"),
    "the other format": (_about(format="e2m3", planes=["w8"]), "first.weight: not a packed weight .* expected"),
    "group size": (_about(group_size=32), r"first.weight.scale is F32 of shape \[4, 256\], expected .* \[8, 256\]"),
    "group size of zero": (_about(group_size=0), "not positive integers"),
    "group size is text": (_about(group_size="64"), "first.weight: not a packed weight"),
    "group size is true": (_about(group_size=True), "not positive integers"),
    "shape": (_about(shape=[256, 260]), "first.weight.w4 is U8"),
    "shape of one": (_about(shape=[256]), "first.weight: not a packed weight"),
    "shape is negative": (_about(shape=[-256, 256]), "not positive integers"),
    "dtype of the weight": (_about(dtype="int8"), "first.weight: not a packed weight"),
    "dtype of scales": (_about(scale_dtype="float16"), "first.weight: not a packed weight .* expected"),
    "planes": (_about(planes=["w4", "w1"]), "first.weight: not a packed weight .* expected"),
    "an extra key": (_about(zero_point=3), "first.weight: not a packed weight .* expected"),
    "a plane is missing": (lambda f: _edit(f, lambda t, s: t.pop("first.weight.w2")), "first.weight.w2 is missing"),
    "scales are missing": (lambda f: _edit(f, lambda t, s: t.pop("first.weight.scale")), "first.weight.scale is missing"),
    "a bias is missing": (lambda f: _edit(f, lambda t, s: t.pop("first.bias")), r"lacks 1 of its tensors \(first.bias\)"),
    "a tensor too many": (lambda f: _edit(f, lambda t, s: t.update(x=torch.zeros(1))), r"has 1 others \(x\)"),
    "a plane too many": (lambda f: _edit(f, lambda t, s: t.update({"first.weight.w1": torch.zeros(1)})), "has 1 others"),
    "a weight forgotten": (_said(weights={}, tied={}), "lacks 3 of its tensors .* has 3 others"),
    "dtype of a plane": (_tensor("first.weight.w4", lambda t: t.view(torch.int8)), "first.weight.w4 is I8 of"),
    "shape of a plane": (_tensor("first.weight.w2", lambda t: t[:-1].clone()), "first.weight.w2 is U8 of"),
    "dtype of the scales": (_tensor("first.weight.scale", lambda t: t.half()), "first.weight.scale is F16 of"),
    "scales transposed": (_tensor("first.weight.scale", lambda t: t.T.contiguous()), "first.weight.scale is F32 of"),
    "a scale is NaN": (_tensor("first.weight.scale", _at(torch.nan)), "first.weight.scale has values that are NaN"),
    "a scale is infinite": (_tensor("first.weight.scale", _at(torch.inf)),
        "first.weight.scale has values that are NaN, inf"),
    "a scale is zero": (_tensor("first.weight.scale", _at(0.0)), "first.weight.scale has values .* not positive"),
    "a scale is negative": (_tensor("first.weight.scale", _at(-1.0)), "first.weight.scale has values .* not positive"),
    "shape of a bias": (_tensor("first.bias", lambda t: t[:-1].clone()),
        r"first.bias is \[256\] in the model and \[255\] in"),
    "integers for a bias": (_tensor("first.bias", lambda t: t.view(torch.int16)),
        "first.bias is torch.float16 in the model and I16 in"),
    "eight bits for a bias": (_tensor("first.bias", lambda t: t.to(torch.float8_e4m3fn)),
        "first.bias is torch.float16 in the model and F8_E4M3 in"),
    "tied to a list": (_said(tied={"second.weight": ["first.weight"]}), "second.weight is tied to .*, which is not there"),
    "a link that leads out": (_link_out, "which fp6.json names, is missing: it is outside the folder"),
    "dtype unknown": (_tensor("first.bias", lambda t: t.view(torch.uint16)), "first.bias is of dtype U16"),
}  # fmt: skip


@pytest.mark.parametrize("what", MEANINGS)
def test_meaning_is_checked(what, folder):
    change, message = MEANINGS[what]
    change(folder)
    _assert_refused(folder, message)


def _content(folder: Path) -> bytes:
    model = _empty_tower()
    fp6_compile.load(model, folder)
    return b"".join(t.dequantize().numpy().tobytes() if isinstance(t, PackedTensor) else t.detach().numpy().tobytes()
                    for t in model.state_dict().values())  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_damaged_headers_that_are_signed(seed, folder):
    """Bits of a shard's header are flipped and hashes made to fit: an error, or a difference that means nothing."""
    rng, before = random.Random(1000 + seed), _content(folder)
    shard = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    shard.write_bytes(data)
    _sign(folder)
    try:
        after = _content(folder)
    except CheckpointError:
        return
    assert after == before


def test_not_a_checkpoint(tmp_path):
    _assert_refused(tmp_path, "is not a checkpoint: cannot read fp6.json")
    _assert_refused(tmp_path / "nowhere", "is not a checkpoint: cannot read fp6.json")


def test_another_model(saved):
    with pytest.raises(CheckpointError, match=r"not of this model: it lacks 2 of its tensors \(bias, weight\) and has"):
        fp6_compile.load(nn.Linear(256, 256), saved)


# What is grown, and devices: nothing before everything is checked.


def _grown(tmp_path, bias) -> Path:
    """A folder whose linear has factors and a bias, for a model that has none."""
    model = nn.Sequential(nn.Linear(128, 128, bias=False)).half()
    fp6_compile.quantize_(model)
    grow(model[0], "low_rank_a", torch.ones(128, 2).half())
    grow(model[0], "low_rank_b", torch.ones(2, 128).half())
    grow(model[0], "bias", bias)
    fp6_compile.save(model, tmp_path)
    return tmp_path


def _state(model):
    return [(type(m), [(name, id(t)) for name, t in m._parameters.items()]) for m in model.modules()]


def _without_bias() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(128, 128, bias=False)).half()


def test_what_is_grown_is_a_float(tmp_path):
    model = _without_bias()
    before = _state(model)
    with pytest.raises(CheckpointError, match="0.bias is torch.float16 in the model and I32 in"):
        fp6_compile.load(model, _grown(tmp_path, torch.ones(128).int()))
    assert _state(model) == before


def test_an_error_halfway_takes_back_what_was_grown(tmp_path, monkeypatch):
    folder, model = _grown(tmp_path, torch.ones(128).half()), _without_bias()
    before, read = _state(model), []
    original = storage.Entry.read

    def fail(entry, *device):
        read.append(entry.name)
        if len(read) == 4:
            raise OSError("the disk is gone")
        return original(entry, *device)

    with monkeypatch.context() as patch:
        patch.setattr(storage.Entry, "read", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            fp6_compile.load(model, folder)
    assert "0.bias" in read
    assert _state(model) == before
    fp6_compile.load(model, folder)
    assert type(model[0]) is LowRankLinear
    assert torch.equal(model[0].bias, torch.ones(128).half())


DEVICES = {
    **({} if torch.cuda.is_available() else {"cuda": ("cuda", "device: got 'cuda': ")}),
    "cuda:99": ("cuda:99", "device: got 'cuda:99': "),
    "nonsense": ("nonsense", "device: got 'nonsense': Expected one of cpu, cuda"),
    "meta": ("meta", "device: got 'meta', needs one that holds values"),
    "a list": ([], r"device: got \[\]: "),
}  # fmt: skip


@pytest.mark.parametrize(("device", "message"), DEVICES.values(), ids=DEVICES)
def test_no_such_device(device, message, tmp_path):
    """Nothing is changed, and of a model that would grow nothing grows."""
    model = _without_bias()
    before, folder = _state(model), _grown(tmp_path, torch.ones(128).half())
    with pytest.raises(ValueError, match=message):
        fp6_compile.load(model, folder, device=device)
    with pytest.raises(ValueError, match=message):
        fp6_compile.load_quark_mxfp6(model, folder, device=device)
    assert _state(model) == before
    full = nn.Sequential(nn.Linear(128, 128)).half()
    before = _state(full)
    for quantize in (fp6_compile.quantize_, fp6_compile.calibrate_):
        with pytest.raises(ValueError, match=message):
            quantize(full, device=device)
    assert _state(full) == before


# Saves that are killed.


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up."""


@contextlib.contextmanager
def _killed_at(point: int, monkeypatch):
    """The `point`-th call that changes the disk does not happen, and neither does anything after it."""
    calls = iter(range(point, -1, -1))

    def guarded(function):
        def call(*args, **kwargs):
            if next(calls, 0) <= 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "open"), (Path, "mkdir")):
            patch.setattr(owner, name, guarded(getattr(owner, name)))
        yield


def test_killed_at_every_step(saved, folder, monkeypatch):
    """Each step of a save in turn is its last: the folder is the old model or the new one, and can be saved to again."""
    new = _packed_tower(seed=1)
    before = _content(folder)
    fp6_compile.save(new, folder.with_name("new"), shard_bytes=200_000)
    after, outcomes = _content(folder.with_name("new")), []
    for point in range(1, 100):
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        try:
            with _killed_at(point, monkeypatch):
                fp6_compile.save(new, folder, shard_bytes=200_000)
        except Killed:
            found = _content(folder)
            assert found in (before, after)
            outcomes.append(found == after)
        else:
            break
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes), "old up to one step, new from then on"
    assert True in outcomes
    assert False in outcomes


@pytest.mark.slow
def test_killed_at_random_times(tmp_path):
    """SIGKILL, 50 times, at random moments of a save: always the old model or the new one."""
    code = f"""
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import fp6_compile
from tests import test_checkpoint as t

models = [t._packed_tower(0), t._packed_tower(1)]
folder = t.Path({str(tmp_path)!r}) / "model"
contents = []
for model in models:
    start = time.monotonic()
    fp6_compile.save(model, folder, shard_bytes=50_000)
    seconds = time.monotonic() - start
    contents.append(t._content(folder))
rng, now, outcomes = random.Random(0), 1, []
for _ in range(50):
    child = os.fork()
    if not child:
        fp6_compile.save(models[1 - now], folder, shard_bytes=50_000)
        os._exit(0)
    time.sleep(rng.random() * seconds * 1.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = contents.index(t._content(folder))
    outcomes.append(found != now)
    now = found
print(sum(outcomes), "new,", len(outcomes) - sum(outcomes), "old")
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
