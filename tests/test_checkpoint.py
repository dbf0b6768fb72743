"""save and load: round trips, what cannot be saved, what grows on loading, and devices."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import CheckpointError
from fp6_compile.packed.low_rank import LowRankLinear, grow
from fp6_compile.storage import safetensors as storage
from tests.support.checkpoints import empty_tower, packed_tower
from tests.support.models import Tower

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")

TOKENS = torch.tensor([[3, 4, 5]])


@pytest.mark.parametrize("make", [empty_tower, lambda: packed_tower(1), Tower], ids=["meta", "packed", "float32"])
def test_round_trip(make, saved):
    original, model = packed_tower(), make().eval()
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
    original = packed_tower()
    planes = original.first.weight.repack("planes.v1")
    stored = (tensors["first.weight_w4"], tensors["first.weight_w2"], tensors["first.weight_scale"].T)
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


def test_fresh_process_gives_the_same_bits(saved, tmp_path, captured):
    """Quantize, save; in a new process load, compile, run."""
    code = f"""
import torch, fp6_compile
from tests.support.graphs import without_codegen
from tests.support.models import Tower
with torch.device("meta"):
    model = Tower().eval()
fp6_compile.load(model, {str(saved)!r})
tokens = torch.tensor([[3, 4, 5]])
with torch.no_grad(), without_codegen():
    torch.save([model(tokens), torch.compile(model, backend="fp6", fullgraph=True)(tokens)], {str(tmp_path / "out.pt")!r})
"""
    model = packed_tower()
    with torch.no_grad():
        expected = [model(TOKENS), torch.compile(model, backend="fp6", fullgraph=True)(TOKENS)]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    for mine, theirs in zip(torch.load(tmp_path / "out.pt"), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = packed_tower()
    fp6_compile.save(torch.compile(model, backend="eager"), tmp_path)
    other = empty_tower()
    fp6_compile.load(torch.compile(other, backend="eager"), tmp_path)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_saving_again_replaces_and_keeps_other_files(saved, folder):
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00009-0.safetensors").write_text("of a save that was killed")
    other = packed_tower(seed=1)
    fp6_compile.save(other, folder)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    model = empty_tower()
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
    fp6_compile.load(empty_tower(), folder)


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
