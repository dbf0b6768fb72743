"""Damaged and re-signed folders, by the hundred: a load gives what the folder declares, or an error that changes nothing.

Each seed damages a copy of a good folder, in its bytes, its headers, its index or its files, and mostly makes the hashes fit
again. What a folder declares is read by a second, independent reader, from the bytes.
"""

import contextlib
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import CheckpointError, PackedTensor
from fp6_compile.packed.low_rank import LowRankLinear, grow
from tests.support.checkpoints import sign_shard
from tests.support.soak import count

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")

SECONDS = 20
# What a number or a name in JSON becomes.
ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    7,
    64,
    2**31,
    2**63,
    2**64,
    10**30,
    1.5,
    "",
    "x",
    "x" * 5000,
    "a\0b",
    "../x",
    [],
    {},
    [[]],
)
ODD += (
    float("nan"),
    float("inf"),
    [128, 128],
    [2**62, 2**62],
    "e3m2",
    "e2m3",
    "int8",
    "float32",
    "bfloat16",
    "planes.v1",
)
NAMES = ("../outside.safetensors", "/dev/zero", "/etc/passwd", "x" * 5000, "a\0b", "\ud800", "", ".", "..", "sub/../x")
DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16, "U8": torch.uint8},
    **{"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F64": torch.float64, "I64": torch.int64},
}


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 160, bias=False)).half()


def _empty_model() -> nn.Sequential:
    with fp6_compile.init_empty_weights():
        return _model()


def _write_checkpoint(folder: Path) -> None:
    """Packed, in several shards, with a bias and factors that a model has to grow."""
    model = _model()
    fp6_compile.quantize_(model, group_size=64)
    grow(model[2], "bias", torch.randn(160).half())
    grow(model[0], "low_rank_a", torch.randn(128, 3).half())
    grow(model[0], "low_rank_b", torch.randn(3, 128).half())
    fp6_compile.save(model, folder, shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1


def _write_source(folder: Path) -> None:
    """A weight in FP8 with a scale for each block, in two shards with an index."""
    folder.mkdir()
    state = _model().state_dict()
    state["0.weight_scale_inv"] = torch.rand(2, 4) / 8 + 0.01
    state["0.weight"] = torch.randn(128, 128).to(torch.float8_e4m3fn)
    names = sorted(state)
    shards = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, part in shards.items():
        safetensors.save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
    found = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": found}))
    quantization = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


# Damage.


def _paths(value, path=()):
    """The places in a JSON value."""
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _paths(child, (*path, key))


def _change_json(rng: random.Random, value):
    """Something in it is replaced, removed, renamed, exchanged or added to."""
    path = rng.choice([path for path in _paths(value) if path])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, what = path[-1], rng.randrange(6)
    if what == 0 and isinstance(holder[key], int):
        holder[key] += rng.choice((-64, -2, -1, 1, 2, 64))
    elif what == 1:
        del holder[key]
    elif what == 2 and isinstance(holder, dict):
        holder[rng.choice((*NAMES, "0.weight", "0.bias", f"{key}_scale", f"{key}_w4"))] = holder.pop(key)
    elif what == 3:
        other = rng.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif what == 4 and isinstance(holder[key], str):
        holder[key] = rng.choice((*DTYPES, *NAMES, *ODD))
    else:
        holder[key] = rng.choice(ODD)
    return value


def _write_json(rng: random.Random, value) -> bytes:
    """Its text, or one that is no plain JSON."""
    text, what = json.dumps(value).encode(), rng.randrange(12)
    if what == 0 and b'"' in text:  # some key, twice
        start = text.index(b"{") + 1
        key = json.dumps(next(iter(value), "x")).encode()
        return (
            text[:start]
            + key
            + b":"
            + rng.choice((b"1", b"{}", json.dumps(next(iter(value.values()), 0)).encode()))
            + b","
            + text[start:]
        )
    if what == 1:
        return text[:-1] + b',"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    if what == 2:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice((b"\xff", b"\xed\xa0\x80", b"NaN", b"9" * 5000, b"\0")) + text[at:]
    return text


def _change_header(rng: random.Random, file: Path) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if "__metadata__" in header and "fp6" in header["__metadata__"] and rng.random() < 0.5:
        said = _change_json(rng, json.loads(header["__metadata__"]["fp6"]))
        header["__metadata__"]["fp6"] = _write_json(rng, said).decode(errors="replace")
        text = json.dumps(header).encode()
    else:
        text = _write_json(rng, _change_json(rng, header))
    text += b" " * (-len(text) % 8)
    size = rng.choice((*[len(text)] * 12, 0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(text) + 8, len(data) - 8))
    file.write_bytes(size.to_bytes(8, "little") + text + rest)


def _change_bytes(rng: random.Random, file: Path) -> None:
    data, what = bytearray(file.read_bytes()), rng.randrange(4)
    at = rng.randrange(min(len(data), rng.choice((9, 200, len(data)))))
    if what == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif what == 1:
        del data[at:]
    elif what == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 40))
    else:
        data[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8)))
    file.write_bytes(data)


def _change_index(rng: random.Random, file: Path) -> None:
    value = json.loads(file.read_bytes())
    named = value.get("weight_map")
    if named and rng.random() < 0.4:
        named[rng.choice(sorted(named))] = rng.choice((*NAMES, str(file.parent / "model-1.safetensors")))
    else:
        value = _change_json(rng, value)
    file.write_bytes(_write_json(rng, value))


def _change_kind(rng: random.Random, file: Path) -> None:
    """The file becomes something else, or another's."""
    what, others = rng.randrange(7), [path for path in sorted(file.parent.iterdir()) if path.is_file()]
    moved = file.parent.parent / f"moved-{file.name}"
    file.rename(moved)
    if what == 0:
        os.mkfifo(file)
    elif what == 1:
        file.symlink_to("/dev/zero")
    elif what == 2:
        file.mkdir()
    elif what == 3:
        file.symlink_to(moved)  # the right bytes, but outside
    elif what == 4:
        file.symlink_to(file.name)
    elif what == 5:
        other = rng.choice([path for path in others if path != file])
        file.write_bytes(other.read_bytes())


def _damage(rng: random.Random, folder: Path) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink()]
        file = rng.choice(files)
        structured = _change_header if file.suffix == ".safetensors" else _change_index
        change = rng.choice((structured, structured, structured, _change_bytes, _change_kind))
        with contextlib.suppress(ValueError, IndexError, KeyError, AttributeError, TypeError, RecursionError):
            change(rng, file)  # one that was damaged before may not allow another change of its kind


# What is declared, by another reader.


def _raw(file: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, header) of a file, by its bytes alone; no key may be there twice."""

    def once(pairs):
        assert len(dict(pairs)) == len(pairs), "a key twice"
        return dict(pairs)

    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length], object_pairs_hook=once)
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, end = about["data_offsets"]
            part = torch.from_numpy(np.frombuffer(data[8 + length + start : 8 + length + end], np.uint8).copy())
            tensors[name] = part.view(DTYPES[about["dtype"]]).view(about["shape"])
    return tensors, header.get("__metadata__", {})


def _assert_checkpoint(model: nn.Module, folder: Path) -> None:
    """The model's tensors are the ones that the folder declares, and all of them."""
    names = ["model.safetensors"]
    if not (folder / names[0]).exists():
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        names = sorted(set(index["weight_map"].values()))
    tensors, weights, tied = {}, {}, {}
    for name in names:
        assert Path(name).name == name
        assert not (folder / name).is_symlink() or (folder / name).resolve().parent == folder.resolve()
        new, said = _raw(folder / name)
        said = json.loads(said["fp6"])
        tensors |= new
        weights |= said["weights"]
        tied |= said["tied"]
    found = dict(model.named_parameters(remove_duplicate=False))
    stored = {name for name in tensors if not any(name.startswith(f"{weight}_") for weight in weights)} | weights.keys()
    assert found.keys() == stored | tied.keys()
    for name, value in found.items():
        name = tied.get(name, name)
        if name in weights:
            assert isinstance(value, PackedTensor)
            about, canonical = weights[name], value.repack("planes.v1")
            assert [value.spec.format, value.spec.group_size] == [about["format"], about["group_size"]]
            assert [str(value.dtype), list(value.shape)] == [f"torch.{about['dtype']}", about["shape"]]
            parts = (*canonical.planes, canonical.scale.T)
            planes = {"e2m3": ("w4", "w2"), "e3m2": ("w4", "w2")}[about["format"]]
            for suffix, part in zip((*planes, "scale"), parts, strict=True):
                assert torch.equal(part, tensors[f"{name}_{suffix}"])
            assert about["dtype"] in ("float16", "bfloat16", "float32")
        else:
            assert value.dtype.is_floating_point
            assert value.dtype == tensors[name].dtype
            assert torch.equal(value.view(torch.uint8), tensors[name].view(torch.uint8)), name


def _assert_source(model: nn.Module, folder: Path) -> None:
    """The model's tensors are the folder's: 8-bit ones times their scales, and quantized."""
    index = folder / "model.safetensors.index.json"
    files = [*folder.glob("*.safetensors")]
    if os.path.lexists(index):
        files = [folder / name for name in set(json.loads(index.read_bytes())["weight_map"].values())]
    tensors = {}
    for file in files:
        assert file.resolve().parent == folder.resolve()
        tensors |= _raw(file)[0]
    config = json.loads((folder / "config.json").read_bytes()) if os.path.lexists(folder / "config.json") else {}
    said = config.get("quantization_config") or config.get("compression_config")
    assert said is None or said["quant_method"] == "fp8"
    for name, value in model.named_parameters():
        true = tensors[name].float()
        if tensors[name].dtype not in (torch.float16, torch.float32, torch.bfloat16, torch.float64):
            scale = next(tensors[name + end] for end in ("_scale_inv", "_scale") if name + end in tensors).float()
            size = said and said.get("weight_block_size")
            block = size or ([1, 128] if scale.numel() > 1 else [128, 128])
            assert list(scale.view(-1, 1).shape if size is None else scale.shape) == [
                -(-n // b) for n, b in zip(true.shape, block, strict=True)
            ]
            true = (
                true
                * torch.kron(scale.view(-1, scale.shape[-1] if size else 1), torch.ones(block))[
                    : true.shape[0], : true.shape[1]
                ]
            )
        else:
            assert not any(f"{name}{end}" in tensors for end in ("_scale", "_scale_inv"))
            true = tensors[name]
        if isinstance(value, PackedTensor):
            assert torch.equal(value.dequantize(), PackedTensor.quantize(true, dtype=torch.float16).dequantize())
        else:
            torch.testing.assert_close(value.detach(), true.half(), rtol=0, atol=0, equal_nan=True)


# The soak.


def _fingerprint(model: nn.Module) -> list:
    """Classes, names, tensors, and their values: anything that a load could change."""

    def about(tensor):
        return id(tensor), None if tensor is None or tensor.is_meta else tensor.detach().numpy().tobytes()

    registries = [(type(m), registry) for m in model.modules() for registry in (m._parameters, m._buffers)]
    return [(kind, [*registry], [about(tensor) for tensor in registry.values()]) for kind, registry in registries]


@contextlib.contextmanager
def _time_limit():
    def stop(*_):
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _outcome(work, *arguments) -> BaseException | None:
    """What it raises, if anything; a TimeoutError if it hangs."""
    try:
        with _time_limit():
            work(*arguments)
    except BaseException as error:
        return error
    return None


KINDS = {
    "checkpoint": (_write_checkpoint, lambda m, f: fp6_compile.load(m, f), _assert_checkpoint),
    "source": (_write_source, lambda m, f: fp6_compile.quantize_(m, source=f), _assert_source),
}


def _soak(kind: str, seeds: range, tmp_path: Path) -> dict[str, int]:
    write, load, check = KINDS[kind]
    write(tmp_path / "good")
    counts = {"refused": 0, "as declared": 0}
    for seed in seeds:
        rng, folder = random.Random(seed), tmp_path / "work" / "folder"
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "work" / "outside.safetensors")
        _damage(rng, folder)
        if kind == "checkpoint" and rng.random() < 0.9:
            for file in folder.glob("*.safetensors"):
                if file.is_file() and not file.is_symlink():
                    sign_shard(file)
        model = rng.choice((_model, _empty_model))()
        before = _fingerprint(model)
        error = _outcome(load, model, folder)
        if error is None:
            check(model, folder)
            counts["as declared"] += 1
            continue
        allowed = CheckpointError if kind == "checkpoint" else (ValueError, FileNotFoundError)
        assert isinstance(error, allowed), (seed, repr(error))
        assert 10 < len(str(error)) < 1000, (seed, error)
        assert _fingerprint(model) == before, (seed, error)
        counts["refused"] += 1
    print(f"{kind}: {counts}")
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders(kind, tmp_path):
    counts = _soak(kind, range(60), tmp_path)
    assert counts["refused"] > 30
    assert counts["as declared"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_folder_is_as_declared(kind, tmp_path):
    write, load, check = KINDS[kind]
    write(tmp_path / "good")
    for model in (_model(1), _empty_model()):
        load(model, tmp_path / "good")
        check(model, tmp_path / "good")
    if kind == "checkpoint":
        assert type(model[0]) is LowRankLinear


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders_by_the_thousand(kind, tmp_path):
    folders = count(1000, 200)
    counts = _soak(kind, range(1000, 1000 + folders), tmp_path)
    assert counts["refused"] > folders // 2
    assert counts["as declared"] > folders // 50
