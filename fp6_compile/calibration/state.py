"""What has been calibrated so far, in a folder: one file per block, and what they belong to.

    calibration.json      a digest of algorithm, format, options, the model's parameters and the inputs
    block-00003.pt        the block's new parameters by name, and its lines of the report

Files appear whole or not at all. A calibration that finds a file takes the block from it; everything else it computes anew,
in the same order, so that it ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fp6_compile.report import LinearReport
from fp6_compile.storage import replace, sync_folder

_INDEX = "calibration.json"


class Done(NamedTuple):
    """A finished block: new parameters by name, and lines of the report by the weight's name."""

    tensors: dict[str, Tensor]
    lines: dict[str, LinearReport]


class State:
    """The folder, or nothing at all for None.

    Raises ValueError if the folder has another calibration's state: `about` tells them apart, in readable parts.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, about: dict[str, str]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / _INDEX
        if not index.exists():
            replace(index, json.dumps(about, indent=1) + "\n")
        known = json.loads(index.read_text())
        if other := [part for part in about if known.get(part) != about[part]]:
            raise ValueError(f"resume: {self.folder} is of a calibration with other {' and '.join(other)}; empty it")

    def load(self, index: int) -> Done | None:
        """What was saved of a block."""
        path = self._path(index)
        if path is None or not path.exists():
            return None
        tensors, lines = torch.load(path, weights_only=True)
        return Done(tensors, {name: LinearReport(*line) for name, line in lines.items()})

    def save(self, index: int, done: Done) -> None:
        """Put a block on the disk, atomically."""
        path = self._path(index)
        if path is None:
            return
        lines = {name: tuple(getattr(line, field) for field in _FIELDS) for name, line in done.lines.items()}
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save((done.tensors, lines), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)

    def _path(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"block-{index:05}.pt"


_FIELDS = tuple(LinearReport.__dataclass_fields__)


def digest(values: Any) -> str:
    """A SHA-256 of all tensors in nested containers, their bytes and shapes, and the text of everything else."""
    sha = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            sha.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            leaf = leaf.detach().cpu().contiguous()
            sha.update((ctypes.c_char * leaf.nbytes).from_address(leaf.data_ptr()) if leaf.nbytes else b"")
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()


def text_digest(lines: Iterable[str]) -> str:
    """A SHA-256 of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
