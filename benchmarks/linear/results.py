"""Files of results, written row by row: a killed run keeps every row that it printed.

`Results(path)` keeps NAME.json, which is whole after every row (written beside and renamed), and NAME.csv, to which every
row is appended with all that is known about the run.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "results"
KINDS = ("measured", "predicted", "stand-in")
# The columns of a row. kind: one of KINDS. measure: graph, cold or host (timing.py), model (simulate.py).
COLUMNS = (
    *("kind", "provider", "measure", "shape", "n", "k", "m", "dtype", "format", "group_size"),
    *("us_p50", "us_p20", "us_p80", "speedup", "gb_s", "share_of_copy", "tflop_s"),
    *("weight_bytes", "bytes", "copies", "error", "note"),
)
_KEY = ("kind", "provider", "measure", "n", "k", "m", "dtype", "format", "group_size")
# A run may be resumed where these are the same.
_SAME = ("kind", "device", "torch", "triton", "commit")
Row = dict[str, Any]


class Results:
    """The rows of one run, in two files, with what is known `about` it: device, versions, commit.

    path: of the .json file; the .csv file lies beside it. resume: go on with the rows that it holds.

    Raises ValueError when predictions would be stored among measurements, when the file exists and is not to be resumed, or
    when the run to be resumed has another device, version or commit.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], resume: bool = False) -> None:
        self.path, self.about, self.rows = path.with_suffix(".json"), dict(about), list[Row]()
        _check_name(self.path, self.about["kind"])
        if self.path.exists():
            self.rows = self._earlier(resume)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._csv.open("w", newline="") as file:
            csv.DictWriter(file, [*COLUMNS, *self.about]).writeheader()
        for row in self.rows:
            self._append(row)
        self._write()

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the same provider, measure and problem is there."""
        return any(all(there.get(name) == row.get(name) for name in _KEY) for there in self.rows)

    def add(self, row: Row) -> None:
        """Keep `row`: columns of COLUMNS, those that are missing empty. Raises ValueError for others."""
        if unknown := row.keys() - set(COLUMNS):
            raise ValueError(f"row: got {sorted(unknown)}, known columns are {list(COLUMNS)}")
        if row["kind"] != self.about["kind"]:
            raise ValueError(f"row: got a {row['kind']} one, this file holds {self.about['kind']} ones")
        self.rows.append({name: row.get(name) for name in COLUMNS})
        self._append(self.rows[-1])
        self._write()

    @property
    def _csv(self) -> Path:
        return self.path.with_suffix(".csv")

    def _earlier(self, resume: bool) -> list[Row]:
        if not resume:
            raise ValueError(f"{self.path}: there already; resume it, or give another name")
        stored = json.loads(self.path.read_text())
        for name in _SAME:
            if stored.get(name) != self.about.get(name):
                raise ValueError(f"{self.path}: {name} was {stored.get(name)!r}, now it is {self.about.get(name)!r}")
        rows: list[Row] = stored["rows"]
        return rows

    def _append(self, row: Row) -> None:
        with self._csv.open("a", newline="") as file:
            csv.DictWriter(file, [*COLUMNS, *self.about]).writerow({**row, **self.about, "kind": row["kind"]})

    def _write(self) -> None:
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        beside = self.path.with_suffix(".json.part")
        beside.write_text(f'{json.dumps(self.about)[:-1]}, "rows": [\n{rows}\n]}}\n')
        os.replace(beside, self.path)


def _check_name(path: Path, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, known kinds are {list(KINDS)}")
    if kind == "measured":
        return
    if FOLDER.resolve() in path.resolve().parents:
        raise ValueError(f"{path}: {kind} figures are not stored in {FOLDER.name}, where measurements are")
    if not path.name.startswith(kind):
        raise ValueError(
            f"{path}: a file of {kind} figures is called {kind}..., so that nobody takes it for measurements"
        )
