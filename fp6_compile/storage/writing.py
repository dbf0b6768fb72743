"""Files that are written whole or not at all.

safetensors files are written here and not by the library, whose writer wants all tensors of a file in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp6_compile.storage.safetensors import NAMES, memory, sha256


def write(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Callable[[Mapping[str, str]], Mapping[str, str]],
) -> str:
    """Write the tensors named by `layout`, in its order, to a new file and to the disk; returns the header's SHA-256.

    `tensors` is consumed one by one. `metadata` makes the file's metadata, of the same length each time, from the tensors'
    `sha256` by name. Raises ValueError for a dtype that safetensors has not.
    """
    hashes = dict.fromkeys(layout, "0" * 64)
    header = _header(layout, metadata(hashes))
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(header)
        for (name, about), tensor in zip(layout.items(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == about, name
            tensor = tensor.detach().cpu().contiguous()
            file.write(memory(tensor))
            hashes[name] = sha256(tensor)
        header = _header(layout, metadata(hashes))
        file.seek(0)
        file.write(header)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(header).hexdigest()


def _header(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in layout.items():
        if dtype not in NAMES:
            raise ValueError(f"{name}: {dtype} has no place in a safetensors file")
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
