"""safetensors folders, one tensor at a time: nothing here ever holds more than the tensor it reads or writes.

The format is eight bytes of header length, a JSON header and the tensors' bytes. Headers are checked by the safetensors
library. Tensors are read here, from a file that stays open: what is read is what was checked, whoever replaces the file
meanwhile, and one that is cut off under us is an error and not a signal, as it would be in mapped memory. They are written
here, too, because the library's writer wants all tensors of a file in memory, together with a SHA-256 and an fsync.
"""

from __future__ import annotations

import contextlib
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

from fp6_compile.storage.files import JSON_LIMIT, member, parse_json, read_json, short

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `dtype` as safetensors writes it ("F16"), `offset` in bytes from the file's beginning."""

    file: File
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor, on `device`, in memory of its own. ValueError if the file has changed since it was opened."""
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        self.file.read_into(tensor, self.offset)
        return tensor.to(device)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a parameter of `dtype` can have its values: they are of the same kind, or floats of 16 bits and more."""
        return DTYPES.get(self.dtype) == dtype or (self.dtype in _FLOATS and _NAMES.get(dtype) in _FLOATS)


def safetensors() -> Any:
    """The safetensors package; ImportError with the way out where it is not installed."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("fp6: checkpoints need safetensors: pip install safetensors") from error
    return safetensors


class File:
    """A safetensors file that is held open. OSError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._stamp = _stamp(self._file.fileno())
        self.size = self._stamp[0]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def sha256(self) -> str:
        """The SHA-256 of its bytes."""
        digest = hashlib.sha256()
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()

    def entries(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """(tensors, metadata), from the header alone. ValueError if it is no safetensors file, or is cut off."""
        library = safetensors()
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        try:
            if length > min(JSON_LIMIT, self.size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {self.size}")
            # The library knows all about offsets, shapes and dtypes, but takes the last of two equal keys.
            header = parse_json(self._file.read(length), "its header")
            found = {}
            with library.safe_open(self.path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (safe_open is not iterable)
                    part, offset = opened.get_slice(name), header[name]["data_offsets"][0] + 8 + length
                    found[name] = Entry(self, name, tuple(part.get_shape()), part.get_dtype(), offset)
                metadata = dict(opened.metadata() or {})
        except (ValueError, OSError, library.SafetensorError) as error:
            raise ValueError(f"{self.path.name}: not a whole safetensors file: {short(error)}") from error
        if _stamp(self.path) != self._stamp:
            raise ValueError(f"{self.path.name} has changed while it was read")
        return found, metadata

    def read_into(self, tensor: Tensor, offset: int) -> None:
        """Fill a contiguous tensor with the bytes from `offset` on. ValueError if the file has changed or ends before."""
        memory = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())) if tensor.nbytes else b""
        self._file.seek(offset)
        done = 0
        while done < tensor.nbytes and (count := self._file.readinto(memory[done:])):
            done += count
        if done < tensor.nbytes or _stamp(self._file.fileno()) != self._stamp:
            raise ValueError(f"{self.path.name} has changed while it was read")


def _stamp(file: Path | int) -> tuple[int, ...]:
    info = os.stat(file)
    return info.st_size, info.st_mtime_ns, info.st_ino, info.st_dev


def entries(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors, metadata) of a file, from its header alone. Raises ValueError if it is no safetensors file or is cut off."""
    return File(file).entries()


def folder_entries(folder: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of all safetensors files of a folder, or of those that its index names.

    Raises FileNotFoundError if there are none; ValueError if a file is damaged or outside of the folder, or an index and its
    files disagree.
    """
    folder = Path(folder)
    names, named = [path.name for path in sorted(folder.glob("*.safetensors"))], ""
    with contextlib.suppress(FileNotFoundError):
        names, named = sorted(_indexed(folder)), f", which {_INDEX} names,"
    if not names:
        raise FileNotFoundError(f"{folder}: no safetensors files in it")
    found: dict[str, Entry] = {}
    for name in names:
        try:
            new = entries(member(folder, name))[0]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder}: {short(name)}{named} is missing") from error
        except ValueError as error:
            raise ValueError(f"{folder}: cannot read {short(name)}{named.rstrip(',')}: {error}") from error
        if twice := sorted(found.keys() & new.keys()):
            raise ValueError(f"{folder}: {short(twice[0])!r} is in {found[twice[0]].file.path.name} and in {name}")
        found |= new
    return found


def _indexed(folder: Path) -> set[str]:
    """The files that the folder's index names. FileNotFoundError if it has no index, ValueError if that is none."""
    try:
        names = read_json(member(folder, _INDEX))["weight_map"].values()
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a file name that is no text")
        return set(names)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{_INDEX}: not an index of safetensors files: {error!r}") from error


def read(wanted: Iterable[Entry], device: torch.device | str = "cpu") -> Iterator[tuple[Entry, Tensor]]:
    """The tensors, in the order asked for, each on `device`."""
    for entry in wanted:
        yield entry, entry.read(device)


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
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
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
    return File(file).sha256()


def replace(path: Path, text: str) -> None:
    """Put `text` at `path`, atomically and on the disk: whoever looks sees the old file or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("x") as file:
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
