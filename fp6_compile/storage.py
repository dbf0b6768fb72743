"""safetensors folders, one tensor at a time: nothing here ever holds more than the tensor it reads or writes.

Reading goes through the safetensors library (memory-mapped). Writing does not, because the library's writer wants all
tensors of a file in memory: the format is eight bytes of header length, a JSON header and the tensors' bytes, and is written
here together with its SHA-256 and an fsync.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `dtype` as safetensors writes it ("F16")."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def safetensors() -> Any:
    """The safetensors package; ImportError with the way out where it is not installed."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("fp6: checkpoints need safetensors: pip install safetensors") from error
    return safetensors


def entries(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors, metadata) of a file, from its header alone. Raises ValueError if it is no safetensors file or is cut off."""
    library = safetensors()
    try:
        with library.safe_open(file, framework="pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118  (safe_open is not iterable)
                part = opened.get_slice(name)
                found[name] = Entry(file, name, tuple(part.get_shape()), part.get_dtype())
            return found, dict(opened.metadata() or {})
    except library.SafetensorError as error:
        raise ValueError(f"{file.name}: not a whole safetensors file: {error}") from error


def folder_entries(folder: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of all safetensors files of a folder, or of those that its index names.

    Raises FileNotFoundError if there are none; ValueError if a file is damaged, or an index and its files disagree.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index.name}: not an index of safetensors files: {error!r}") from error
    if not files:
        raise FileNotFoundError(f"{folder}: no safetensors files in it")
    found: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: {file.name}, which {index.name} names, is missing")
        new = entries(file)[0]
        twice = found.keys() & new.keys()
        if twice:
            raise ValueError(f"{folder}: {sorted(twice)[0]!r} is in {found[min(twice)].file.name} and in {file.name}")
        found |= new
    return found


def read(wanted: Iterable[Entry], device: torch.device | str = "cpu") -> Iterator[tuple[Entry, Tensor]]:
    """The tensors, in the order asked for, each on `device`. On a CPU they are maps of the file: copy what is to stay."""
    opened, file = None, None
    for entry in wanted:
        if entry.file != file:
            opened, file = safetensors().safe_open(entry.file, framework="pt", device=str(device)), entry.file
        assert opened is not None
        yield entry, opened.get_tensor(entry.name)


def write(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor], metadata: Any
) -> str:
    """Write the tensors named by `layout`, in its order, to a new file and to the disk; returns its SHA-256.

    `tensors` is consumed one by one. Raises ValueError for a dtype that safetensors has not.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in layout.items():
        if dtype not in _NAMES:
            raise ValueError(f"{name}: {dtype} has no place in a safetensors file")
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            file.write(data)
            digest.update(data)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
            tensor = tensor.detach().cpu().contiguous()
            if tensor.nbytes:
                memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
                file.write(memory)
                digest.update(memory)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def replace(path: Path, text: str) -> None:
    """Put `text` at `path`, atomically and on the disk: whoever looks sees the old file or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
