"""Files that others wrote, the checked way: regular files inside their folder, and JSON that is plain and small.

Whatever a folder names goes through `member`: an index must not lead to other people's files, nor a pipe stop the process.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

# Bytes of a JSON text, the safetensors library's own limit for headers; and how deep it may be nested.
JSON_LIMIT = 100_000_000
_DEPTH = 50


def member(folder: Path, name: object) -> Path:
    """The path of the regular file called `name` inside `folder`; symbolic links are followed, but not out of it.

    Only the layout of Hugging Face's cache may leave it: snapshots/REVISION/x is a link into the blobs of the same model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is outside, no regular file, or no name; the message goes on from "cannot read x: ".
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{short(name)!r} is no file name")
    path, home = folder / name, Path(os.path.realpath(folder))
    try:
        real = Path(os.path.realpath(path))
        if Path(name).is_absolute() or ".." in Path(name).parts or not _inside(real, home):
            raise ValueError("it is outside the folder")
        mode = real.stat().st_mode
    except UnicodeEncodeError as error:
        raise ValueError(f"{short(name)!r} is no file name") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
        raise ValueError(error.strerror) from error
    if not stat.S_ISREG(mode):
        raise ValueError("it is no regular file")
    return path


def read_json(path: Path) -> Any:
    """What `parse_json` makes of a file that `member` gave."""
    with path.open("rb") as file:
        return parse_json(file.read(JSON_LIMIT + 1), path.name)


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text. ValueError naming `where` if it is none, is large or deep, or has a key twice, or NaN."""
    try:
        if len(text) > JSON_LIMIT:
            raise ValueError(f"it has more than {JSON_LIMIT} bytes")
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    level = [value]
    for _ in range(_DEPTH):
        level = [c for v in level if isinstance(v, (dict, list)) for c in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise ValueError(f"{where} is not JSON: it is nested more than {_DEPTH} deep")
    return value


def short(name: object, limit: int = 120) -> str:
    """A name or a text for a message, which may come from a file and be of any length."""
    text = str(name)
    return text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text)} characters)"


def reason(error: Exception) -> str:
    """What an OSError or a ValueError says, without numbers and paths."""
    return getattr(error, "strerror", None) or str(error)


def _inside(real: Path, home: Path) -> bool:
    snapshot = next((path for path in (home, *home.parents) if path.parent.name == "snapshots"), None)
    blobs = [] if snapshot is None else [snapshot.parent.parent / "blobs"]
    return any(real.is_relative_to(root) for root in (home, *blobs))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {short(next(n for n in names if names.count(n) > 1))!r} twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"it has a {constant}")
