"""safetensors folders, one tensor at a time: nothing here ever holds more than the tensor it reads.

The format is eight bytes of header length, a JSON header and the tensors' bytes. Headers are checked by the safetensors
library. Tensors are read here, from a file that stays open: what is read is what was checked, whoever replaces the file
meanwhile, and one that is cut off under us is an error and not a signal, as it would be in mapped memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Iterable, Iterator
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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
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

    def sha256(self) -> str:
        """What `sha256` says of the tensor. ValueError as of `read`."""
        digest = _started(DTYPES.get(self.dtype), self.shape)
        left, offset = torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize, self.offset
        while left:
            chunk = torch.empty(min(left, _CHUNK), dtype=torch.uint8)
            self.file.read_into(chunk, offset)
            digest.update(memory(chunk))
            left, offset = left - chunk.nbytes, offset + chunk.nbytes
        return digest.hexdigest()

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a parameter of `dtype` can have its values: they are of the same kind, or floats of 16 bits and more."""
        return DTYPES.get(self.dtype) == dtype or (self.dtype in _FLOATS and NAMES.get(dtype) in _FLOATS)


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
        into = memory(tensor)
        self._file.seek(offset)
        done = 0
        while done < tensor.nbytes and (count := self._file.readinto(into[done:])):
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


def sha256(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's dtype, shape and bytes, in order."""
    tensor = tensor.detach().cpu().contiguous()
    digest = _started(tensor.dtype, tuple(tensor.shape))
    digest.update(memory(tensor))
    return digest.hexdigest()


def _started(dtype: torch.dtype | None, shape: tuple[int, ...]) -> Any:
    return hashlib.sha256(f"{dtype} {list(shape)}\n".encode())


def memory(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor on a CPU."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())) if tensor.nbytes else b""
