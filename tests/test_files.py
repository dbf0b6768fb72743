"""Files that others wrote: names that lead out of their folder, files that are none, JSON that is no plain JSON."""

import contextlib
import json
import os
import shutil
import signal

import pytest
import torch
from torch import nn

import fp6_compile
from fp6_compile import CheckpointError, init_empty_weights, quantize_
from fp6_compile.storage.files import JSON_LIMIT, member, parse_json, read_json, short
from fp6_compile.storage.safetensors import Entry
from tests.support.checkpoints import INDEX, sign

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an optional extra")


@pytest.fixture(autouse=True)
def _no_hangs():
    """A pipe or a device that is read ends the test, and not the patience of who runs it."""
    signal.alarm(60)
    yield
    signal.alarm(0)


# Names.


@pytest.fixture
def home(tmp_path):
    """A folder with files, and one outside."""
    (tmp_path / "home" / "sub").mkdir(parents=True)
    (tmp_path / "outside").write_text("secret")
    for name in ("file", "sub/file"):
        (tmp_path / "home" / name).write_text("{}")
    (tmp_path / "home" / "inside").symlink_to("file")
    (tmp_path / "home" / "link").symlink_to("../outside")
    (tmp_path / "home" / "loop").symlink_to("loop")
    (tmp_path / "home" / "zero").symlink_to("/dev/zero")
    (tmp_path / "home" / "door").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "home" / "pipe")
    return tmp_path / "home"


@pytest.mark.parametrize("name", ["file", "sub/file", "inside"])
def test_members(home, name):
    assert member(home, name).read_text() == "{}"
    (home.parent / "alias").symlink_to(home)
    assert member(home.parent / "alias", name).read_text() == "{}"


NO_MEMBERS = {
    "../outside": "outside the folder", "sub/../file": "outside the folder", "link": "outside the folder",
    "door/outside": "outside the folder", "/etc/passwd": "outside the folder", "zero": "outside the folder",
    "pipe": "no regular file", "sub": "no regular file", ".": "no regular file", "": "no file name", "a\0b": "no file name",
    "\ud800": "no file name", "x" * 5000: "too long", "loop": "symbolic links",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_MEMBERS, ids=short)
def test_what_is_no_member(home, name):
    with pytest.raises(ValueError, match=NO_MEMBERS[name]):
        member(home, name)


@pytest.mark.parametrize("name", [None, 3, ["file"]])
def test_what_is_no_name(home, name):
    with pytest.raises(ValueError, match="is no file name"):
        member(home, name)


@pytest.mark.parametrize("name", ["nothing", "nowhere/file", "file/x"])
def test_what_is_missing(home, name):
    with pytest.raises(FileNotFoundError):
        member(home, name)


def test_the_cache_of_hugging_face(tmp_path):
    """snapshots/REVISION/x is a link into the blobs of the same model, and of no other."""
    for model in ("models--a--b", "models--c--d"):
        (tmp_path / model / "blobs").mkdir(parents=True)
        (tmp_path / model / "blobs" / "0123").write_text("{}")
        (tmp_path / model / "refs").write_text("{}")
    folder = tmp_path / "models--a--b" / "snapshots" / "main"
    (folder / "sub").mkdir(parents=True)
    (folder / "x").symlink_to("../../blobs/0123")
    (folder / "sub" / "x").symlink_to("../../../blobs/0123")
    (folder / "refs").symlink_to("../../refs")
    (folder / "other").symlink_to("../../../models--c--d/blobs/0123")
    assert member(folder, "x").read_text() == "{}"
    assert member(folder, "sub/x").read_text() == "{}"
    assert member(folder / "sub", "x").read_text() == "{}"
    for name in ("refs", "other"):
        with pytest.raises(ValueError, match="outside the folder"):
            member(folder, name)
    (tmp_path / "models--a--b" / "blobs" / "out").symlink_to(tmp_path / "models--c--d" / "refs")
    (folder / "out").symlink_to("../../blobs/out")
    with pytest.raises(ValueError, match="outside the folder"):
        member(folder, "out")


# JSON.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "it has 'a' twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "it has 'a' twice"),
        ('{"a": NaN}', "it has a NaN"),
        ('{"a": -Infinity}', "it has a -Infinity"),
        ("[" * 100_000 + "]" * 100_000, "maximum recursion depth"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ('{"a":' * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        ('"a"'.encode("utf-16"), "can't decode byte"),
        ("9" * 5000, "integer string conversion"),
        ("", "Expecting value"),
        ("{}{}", "Extra data"),
    ],
    ids=range(12),
)
def test_no_plain_json(text, message):
    with pytest.raises(ValueError, match=f"^index is not JSON: .*{message}"):
        parse_json(text, "index")


def test_json_is_bounded(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10 * JSON_LIMIT)
    with pytest.raises(ValueError, match=f"large.json is not JSON: it has more than {JSON_LIMIT} bytes"):
        read_json(tmp_path / "large.json")


# Folders.


def _model() -> nn.Linear:
    with init_empty_weights():
        return nn.Linear(128, 128).half()


def _write(folder) -> None:
    folder.mkdir()
    safetensors.save_file(nn.Linear(128, 128).half().state_dict(), folder / "model.safetensors")


def _write_packed(folder) -> None:
    model = nn.Linear(128, 128).half()
    quantize_(model)
    fp6_compile.save(model, folder)


def _header(folder, change) -> None:
    """The header's text is changed, and all hashes made to fit."""
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    if (folder / INDEX).exists():
        sign(folder)


def _length(folder, value) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(value.to_bytes(8, "little") + file.read_bytes()[8:])
    if (folder / INDEX).exists():
        sign(folder)


def _edit(key, value):
    def change(text):
        header = json.loads(text)
        header["bias"][key] = value(header["bias"][key])
        return json.dumps(header).encode()

    return lambda folder: _header(folder, change)


def _again(text):
    return text.rstrip(b" }") + b'}, "bias": {"dtype": "BF16", "shape": [128], "data_offsets": [0, 256]}}'


HEADERS = {
    "a key twice": (lambda f: _header(f, _again),
        "its header is not JSON: it has 'bias' twice"),
    "deep": (lambda f: _header(f, lambda t: b'{"x":' + b"[" * 9999 + b"]" * 9999 + b"}"), "recursion depth"),
    "NaN": (lambda f: _header(f, lambda t: t.replace(b"128", b"NaN", 1)), "it has a NaN"),
    "no text": (lambda f: _header(f, lambda t: t.replace(b"bias", b"b\xffas", 1)), "can't decode byte 0xff"),
    "a long header": (lambda f: _length(f, 2**63), "a header of 9223372036854775808 bytes in a file of"),
    "a header beyond the file": (lambda f: _length(f, 80_000), "a header of 80000 bytes in a file of"),
    "negative offsets": (_edit("data_offsets", lambda o: [-256, 0]), "not a whole safetensors file"),
    "overlapping offsets": (_edit("data_offsets", lambda o: [o[0] + 2, o[1] + 2]), "not a whole safetensors file"),
    "offsets beyond the file": (_edit("data_offsets", lambda o: [2**40, 2**40 + 256]), "not a whole safetensors file"),
    "a huge shape": (_edit("shape", lambda s: [2**40, 2**40]), "not a whole safetensors file"),
    "a shape beyond integers": (_edit("shape", lambda s: [10**30]), "not a whole safetensors file"),
    "a name of 5,000 characters": (lambda f: _header(f, lambda t: t.replace(b'"bias"', b'"' + b"x" * 5000 + b'"', 1)),
        r"not in source: bias|has 1 others \(x{100}... \(5000 characters\)\)"),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["source", "checkpoint"])
@pytest.mark.parametrize("what", HEADERS)
def test_headers(what, packed, tmp_path):
    change, message = HEADERS[what]
    (_write_packed if packed else _write)(tmp_path / "folder")
    change(tmp_path / "folder")
    model = _model()
    with pytest.raises(CheckpointError if packed else ValueError, match=message):
        _load(model, tmp_path / "folder", packed)
    assert model.weight.is_meta


def _load(model, folder, packed) -> None:
    if packed:
        fp6_compile.load(model, folder)
    else:
        quantize_(model, source=folder)


KINDS = {
    "pipe": (lambda path, moved: os.mkfifo(path), "no regular file"),
    "folder": (lambda path, moved: path.mkdir(), "no regular file"),
    "device": (lambda path, moved: path.symlink_to("/dev/zero"), "outside the folder"),
    "a link that leads out": (lambda path, moved: path.symlink_to(moved), "outside the folder"),
    "a link to itself": (lambda path, moved: path.symlink_to(path.name), "symbolic links"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", INDEX, "config.json"),
        *(f"packed {name}" for name in ("model.safetensors", INDEX, "model-*")),
    ],
)
def test_files_that_are_none(name, kind, tmp_path):
    """Of a source and of a packed folder, whatever the file."""
    folder, packed, (make, message) = tmp_path / "folder", name.startswith("packed "), KINDS[kind]
    name = name.removeprefix("packed ")
    (_write_packed if packed else _write)(folder)
    path = next(folder.glob(name), folder / name)
    moved = tmp_path / "moved"
    with contextlib.suppress(FileNotFoundError):
        shutil.move(path, moved)
    moved.touch()
    make(path, moved)
    model = _model()
    with pytest.raises(CheckpointError if packed else ValueError, match=message):
        _load(model, folder, packed)
    assert model.weight.is_meta


@pytest.mark.parametrize("name", ["../out.safetensors", "/out.safetensors", "x" * 5000, "", 3, None])
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    _write(tmp_path / "folder")
    shutil.copy(tmp_path / "folder" / "model.safetensors", tmp_path / "out.safetensors")
    if name == "/out.safetensors":
        name = str(tmp_path / "out.safetensors")
    index = {"weight_map": {"weight": name, "bias": "model.safetensors"}}
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the folder|too long|no file name|not an index of safetensors files"):
        quantize_(_model(), source=tmp_path / "folder")


def test_a_folder_in_the_cache_of_hugging_face(tmp_path):
    """Sharded, with an index: every file is a link into blobs."""
    _write(tmp_path / "written")
    index = {"weight_map": dict.fromkeys(("weight", "bias"), "model.safetensors")}
    (tmp_path / "written" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "written" / "config.json").write_text("{}")
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "written").iterdir())):
        path.rename(tmp_path / "models--a--b" / "blobs" / str(number))
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    model = _model()
    assert quantize_(model, source=folder).quantized
    assert not any(parameter.is_meta for parameter in model.parameters())


# Files that change while they are read.


@pytest.mark.parametrize("packed", [False, True], ids=["source", "checkpoint"])
@pytest.mark.parametrize("how", ["replaced", "cut off", "written to"])
def test_files_that_change_while_they_are_read(how, packed, tmp_path, monkeypatch):
    """Another file in its place is not noticed and does no harm; one that is written to is an error, and undone."""
    folder = tmp_path / "folder"
    (_write_packed if packed else _write)(folder)
    file, first = next(folder.glob("*.safetensors")), []
    original = Entry.read
    expected = _model()
    _load(expected, folder, packed)

    def read(entry, *device):
        value = original(entry, *device)
        if not first and entry.name in ("weight", "bias"):
            first.append(entry)
            if how == "replaced":
                (tmp_path / "new").write_bytes(bytes(file.stat().st_size))
                os.replace(tmp_path / "new", file)
            elif how == "cut off":
                os.truncate(file, 400)
            else:
                with file.open("r+b") as opened:
                    opened.seek(-9, os.SEEK_END)
                    opened.write(b"12345678")
        return value

    monkeypatch.setattr(Entry, "read", read)
    model = _model()
    weight, bias = model.weight, model.bias
    if how == "replaced":
        _load(model, folder, packed)
        assert torch.equal(model.weight, expected.weight)
        assert torch.equal(model.bias, expected.bias)
        return
    with pytest.raises(ValueError, match="safetensors has changed while it was read"):
        _load(model, folder, packed)
    assert first
    assert (model.weight is weight, model.bias is bias) == (True, True)
