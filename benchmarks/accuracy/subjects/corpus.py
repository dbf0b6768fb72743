"""Texts that every Python has: sentences, prose, and beginnings of functions; and noise.

Sentences are the first ones of docstrings in a quarter of the standard library's files, ordered by a hash. Prose is the
language reference that `help("keywords")` prints (pydoc_data.topics): English with some code, which the code model was
not trained on. They differ a little between Python versions; every row of results names its version.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from pathlib import Path

import torch

from benchmarks.accuracy.subjects.metrics import HEADER
from examples.code_lm.data import SEPARATOR, read_documents


def sentences(root: Path | None = None) -> list[str]:
    """First sentences, of 6 to 40 words, of docstrings in a quarter of the files below `root`."""
    found = set()
    for name, text in read_documents(root or Path(sysconfig.get_path("stdlib"))).items():
        if hashlib.sha256(name.encode()).digest()[0] % 4:  # parsing all of it takes seconds
            continue
        for node in ast.walk(ast.parse(text[1:])):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                found.add(_first_sentence(ast.get_docstring(node) or ""))
    return sorted(found - {""}, key=lambda text: hashlib.sha256(text.encode()).digest())


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) ", paragraph)[0]
    return sentence if sentence.endswith(".") and 6 <= len(sentence.split()) <= 40 else ""


def prose() -> dict[str, bytes]:
    """Chapters of Python's language reference, each led by a separator, as code_lm's documents are."""
    from pydoc_data import topics

    return {name: SEPARATOR + text.encode() for name, text in sorted(topics.topics.items())}


def split_prose() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Chapters to calibrate on, and other ones to evaluate on."""
    first = {name: text for name, text in prose().items() if hashlib.sha256(name.encode()).digest()[0] % 2}
    return first, {name: text for name, text in prose().items() if name not in first}


def function_starts(documents: dict[str, bytes], context: int) -> list[tuple[str, str]]:
    """(at least `context` characters that end with a `def` line and its line end, that line), for every one there is."""
    starts = []
    for document in documents.values():
        text = document[1:].decode(errors="replace")
        starts += [(text[: match.end() + 1], match[0]) for match in HEADER.finditer(text) if match.end() >= context]
    return starts


def noise(count: int = 64) -> dict[str, bytes]:
    """Documents of printable characters that mean nothing."""
    drawn = torch.randint(32, 127, (count, 1024), generator=torch.Generator().manual_seed(1))
    return {f"{i:05}": bytes(row) for i, row in enumerate(drawn.tolist())}
