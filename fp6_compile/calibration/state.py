"""Finished blocks of a calibration in a folder, to resume from: one file per block, and what they belong to.

    calibration.json      a digest of algorithm, format, options, the model's parameters and the inputs
    block-00003.pt        a SHA-256 of what follows and of what the block was made from; the block's new parameters by name,
                          and its lines of the report

A block was made from what calibration.json says and from the values of all weights up to the block's own. Files
appear whole or not at all. A calibration loads the blocks whose files fit and computes all others in the same order, so that
it ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.report import LinearReport, log
from fp6_compile.storage.files import member, read_json, reason
from fp6_compile.storage.writing import replace, sync_folder

_INDEX = "calibration.json"


class Done(NamedTuple):
    """A finished block: new parameters by name, and lines of the report by the weight's name."""

    tensors: dict[str, Tensor]
    lines: dict[str, LinearReport]


class State:
    """The folder, or nothing at all for None.

    Raises ValueError if the folder has another calibration's state, or its calibration.json cannot be read: `about` tells
    them apart, in readable parts.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, about: dict[str, str]) -> None:
        self.folder = None if folder is None else Path(folder)
        self._made_from = text_digest([*about, *about.values()])
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            known = read_json(member(self.folder, _INDEX))
            if not isinstance(known, dict):
                raise ValueError(f"{_INDEX} is no table")
        except FileNotFoundError:
            replace(self.folder / _INDEX, json.dumps(about, indent=1) + "\n")
            known = about
        except ValueError as error:
            raise ValueError(f"resume: {self.folder}: cannot read {_INDEX}: {reason(error)}; empty it") from error
        if other := [part for part in about if known.get(part) != about[part]]:
            raise ValueError(f"resume: {self.folder} is of a calibration with other {' and '.join(other)}; empty it")

    def enter(self, weights: Iterable[Any]) -> None:
        """Blocks from here on are also made from `weights`, which are consumed one by one."""
        if self.folder is not None:
            self._made_from = text_digest([self._made_from, *(digest(weight) for weight in weights)])

    def load(self, index: int) -> Done | None:
        """A saved block; None if there is none, and with a warning if it is damaged or was made from other weights."""
        if self.folder is None:
            return None
        name = _name(index)
        try:
            data = memoryview(member(self.folder, name).read_bytes())
            if data[:_DIGEST] != self._digest(data[_DIGEST:]):
                raise ValueError("it is damaged, or of other weights")
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("resume: %s: %s: %s; it is computed anew", self.folder, name, error)
            return None
        tensors, lines = torch.load(io.BytesIO(data[_DIGEST:]), weights_only=True)
        return Done(tensors, {name: LinearReport(*line) for name, line in lines.items()})

    def save(self, index: int, done: Done) -> None:
        """Write a block to its file, atomically."""
        if self.folder is None:
            return
        lines = {name: tuple(getattr(line, field) for field in _FIELDS) for name, line in done.lines.items()}
        buffer = io.BytesIO()
        torch.save((done.tensors, lines), buffer)
        path = self.folder / _name(index)
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            file.write(self._digest(buffer.getbuffer()))
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)

    def _digest(self, data: Any) -> bytes:
        sha = hashlib.sha256(self._made_from.encode())
        sha.update(data)
        return sha.hexdigest().encode()


def _name(index: int) -> str:
    return f"block-{index:05}.pt"


_DIGEST = 64
_FIELDS = tuple(LinearReport.__dataclass_fields__)


def digest(values: Any) -> str:
    """A SHA-256 of all tensors in nested containers, their bytes and shapes, and the text of everything else."""
    sha = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, PackedTensor):
            sha.update(digest((leaf.planes, leaf.scale, repr(leaf.spec))).encode())
        elif isinstance(leaf, Tensor):
            sha.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            leaf = leaf.detach().cpu().contiguous()
            sha.update((ctypes.c_char * leaf.nbytes).from_address(leaf.data_ptr()) if leaf.nbytes else b"")
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()


def text_digest(lines: Iterable[str]) -> str:
    """A SHA-256 of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
