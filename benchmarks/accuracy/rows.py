"""The study's results: one JSON line per finished row, so that a killed run loses only the row in progress.

A row is identified by its subject and its label, and has the versions, commit and date that it was measured with.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """The rows in `path`, a .jsonl file that is made when there are some. `about` is added to each new one."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)
        # What follows the last line end is the row at which a run was killed.
        whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
        self.rows: list[Row] = [json.loads(line) for line in whole.splitlines()]

    def has(self, subject: str, size: str, label: str) -> bool:
        """Whether this row is finished, on as much text."""
        return any((row["subject"], row["size"], row["label"]) == (subject, size, label) for row in self.rows)

    def add(self, row: Row) -> None:
        """Keep a finished row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows.append({**row, **self.about})
        beside = self.path.with_suffix(".part")
        beside.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(beside, self.path)

    def of(self, subject: str) -> list[Row]:
        """The rows of one of `subjects`, in the order in which they were measured."""
        return [row for row in self.rows if _title(row) == subject]

    @property
    def subjects(self) -> list[str]:
        """Their names and sizes, in order."""
        return list(dict.fromkeys(map(_title, self.rows)))


def _title(row: Row) -> str:
    return f"{row['subject']} ({row['size']})"


def export(rows: list[Row], path: Path) -> None:
    """Write `rows` to PATH.json, one a line, and without what is a list or a table in itself to PATH.csv."""
    flat = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
    kept = [{k: v for k, v in row.items() if k not in ("losses", "weights")} for row in rows]
    beside = path.with_suffix(".json.part")
    beside.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    os.replace(beside, path.with_suffix(".json"))
