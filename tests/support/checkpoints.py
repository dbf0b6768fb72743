"""Folders with checkpoints: how tests write them, sign them again after a change, and read them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import torch

import fp6_compile
from fp6_compile import PackedTensor
from fp6_compile.storage import safetensors as storage
from tests.support.models import Tower


def packed_tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    model = Tower().half().eval()
    fp6_compile.quantize_(model, group_size=64)
    return model


def empty_tower() -> Tower:
    with torch.device("meta"):
        return Tower().eval()


INDEX = "model.safetensors.index.json"


def digest(value: object) -> str:
    """As a shard's metadata has it of itself."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parse(data: bytes) -> tuple[dict, bytes]:
    """(header, bytes of the tensors) of a safetensors file. ValueError for a key that is there twice."""

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length], object_pairs_hook=once), data[8 + length :]


def sign_shard(file: Path) -> None:
    """Make the hashes in a shard's metadata fit what is in it, if it still has such a table."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        header, rest = parse(file.read_bytes())
        said = json.loads(header["__metadata__"]["fp6"])
        said.pop("digest", None)
        hashes = {}
        for name in header.keys() - {"__metadata__"}:
            dtype, shape = storage.DTYPES.get(header[name]["dtype"]), list(header[name]["shape"])
            start, end = header[name]["data_offsets"]
            hashes[name] = hashlib.sha256(f"{dtype} {shape}\n".encode() + rest[start:end]).hexdigest()
        if isinstance(said.get("sha256"), dict):
            said["sha256"] = hashes
        header["__metadata__"]["fp6"] = json.dumps({**said, "digest": digest(said)})
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def sign(folder: Path, change=lambda index: None) -> None:
    """Make all hashes fit, and the index, as far as files can be read; then change the index."""
    index = json.loads((folder / INDEX).read_bytes())
    buffers = index["metadata"].get("fp6_buffers")
    where = index["weight_map"]
    for file in folder.glob("*.safetensors"):
        sign_shard(file)
        with contextlib.suppress(ValueError, RecursionError):
            names = parse(file.read_bytes())[0].keys() - {"__metadata__"}
            others = {name: other for name, other in where.items() if other != file.name}
            where = others if file.name == buffers else {**others, **dict.fromkeys(names, file.name)}
    index["weight_map"] = where
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def content(folder: Path) -> bytes:
    """All values of the tower that `folder` holds."""
    model = empty_tower()
    fp6_compile.load(model, folder)
    return b"".join(t.dequantize().numpy().tobytes() if isinstance(t, PackedTensor) else t.detach().numpy().tobytes()
                    for t in model.state_dict().values())  # fmt: skip


def mx_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Four codes to 24 bits, little end first, one by one: the specification, slowly."""
    rows = []
    for row in codes.tolist():
        words = [sum(code << 6 * i for i, code in enumerate(row[k : k + 4])) for k in range(0, len(row), 4)]
        rows.append([byte for word in words for byte in word.to_bytes(3, "little")])
    return torch.tensor(rows, dtype=torch.uint8)
