"""Bytes of the Python standard library's own source: a corpus that every reader of this file already has.

How it works. Every `*.py` below `sysconfig.get_path("stdlib")` is a document, led by one NUL byte, which never occurs
in source. A file is held out when a hash of its relative path says so, about one in twenty. The hash knows nothing of
the other files, so a file that exists in two Python versions is on the same side in both, and weights that were
trained under one may be judged under another.

Training batches are a pure function of (seed, step): to resume, one needs to remember the step and nothing else.

What it leaves out: tests (repetitive), generated tables and texts (`encodings`, `pydoc_data`: a quarter of the bytes
and hardly Python), installed packages (not the same on two machines).
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEPARATOR = b"\0"
HELD_OUT_PERMILLE = 50
# Of each held-out document, so that turtle.py alone does not make up a fifth of the score.
KIB_PER_FILE = 16
# The value of a target that is padding; F.cross_entropy skips it.
PADDING = -1

_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


class Split(NamedTuple):
    """Training bytes as one uint8 tensor [N], and the held-out documents by relative path, in sorted order."""

    train: Tensor
    held_out: dict[str, bytes]


def is_held_out(path: str) -> bool:
    """Whether the file with this relative POSIX path is kept from training."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PERMILLE


def _is_source(path: Path) -> bool:
    # _sysconfigdata is written when Python is built and holds that machine's paths.
    return _EXCLUDED_FOLDERS.isdisjoint(path.parts) and not path.name.startswith("_sysconfigdata")


def read_documents(root: Path) -> dict[str, bytes]:
    """The source files below `root` by relative POSIX path, as UTF-8 with "\\n" line ends, each led by a separator.

    Files that are not UTF-8, hold a NUL, or cannot be read are left out.
    """
    documents = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _is_source(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text and "\0" not in text:
            documents[relative.as_posix()] = SEPARATOR + text.encode()
    return documents


def split_documents(documents: dict[str, bytes]) -> Split:
    """Divide documents by the hash of their path; the result does not depend on their order.

    Raises:
        ValueError: when one of the two sides would be empty.
    """
    train = [documents[path] for path in sorted(documents) if not is_held_out(path)]
    held_out = {path: documents[path] for path in sorted(documents) if is_held_out(path)}
    if not train or not held_out:
        raise ValueError(f"{len(documents)} documents are too few to split into training and held-out ones")
    return Split(torch.frombuffer(bytearray(b"".join(train)), dtype=torch.uint8), held_out)


def load_split(root: Path | None = None) -> Split:
    """The running Python's standard library (or any folder of Python source), read and split.

    Raises:
        ValueError: when there is no source below `root`, as in Pythons that ship their library as bytecode.
    """
    return split_documents(read_documents(root or Path(sysconfig.get_path("stdlib"))))


def training_batch(train: Tensor, step: int, *, seed: int, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both int64 [batch_size, length], drawn uniformly; the same for the same (seed, step).

    Raises:
        ValueError: when the training bytes are fewer than one window.
    """
    if len(train) <= length:
        raise ValueError(f"windows of {length} bytes do not fit in {len(train)} training bytes")
    # Two streams never meet: seeds differ in the high bits, steps in the low ones.
    generator = torch.Generator().manual_seed((seed << 32) + step)
    starts = torch.randint(len(train) - length, (batch_size, 1), generator=generator)
    windows = train[starts + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def held_out_windows(held_out: dict[str, bytes], *, length: int, kib_per_file: int = KIB_PER_FILE) -> Tensor:
    """The first `kib_per_file` KiB of every document, cut into int64 windows [N, length + 1].

    A window's first byte is the last of the window before, so each byte is predicted exactly once, with at most
    `length` bytes of context. Short windows end in `PADDING`.
    """
    windows = []
    for path in sorted(held_out):
        document = torch.tensor(list(held_out[path][: 1024 * kib_per_file]), dtype=torch.int64)
        for start in range(0, len(document) - 1, length):
            piece = document[start : start + length + 1]
            windows.append(F.pad(piece, (0, length + 1 - len(piece)), value=PADDING))
    return torch.stack(windows)


@torch.inference_mode()
def bits_per_byte(model: nn.Module, windows: Tensor, *, batch_size: int = 16) -> float:
    """Mean negative log2 likelihood of the bytes in `windows` (from `held_out_windows`); 8 is knowing nothing.

    Runs on the device of the model's parameters and in their dtype; the model may be a compiled one.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for chunk in windows.split(batch_size):
        targets = chunk[:, 1:].to(device)
        logits = model(chunk[:, :-1].clamp(min=0).to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum")
        total += loss.item()
        count += int((targets != PADDING).sum())
    return total / count / math.log(2)
