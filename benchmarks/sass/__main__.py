"""The kernel's machine code against a budget, without a GPU: `python -m benchmarks.sass [--check] [--json FILE]`.

A line for each case: instructions of the hot loop divided by the weights that a thread unpacks in it, in all and by the pipe
that issues them; registers, stack and shared memory; the matrix instruction. These are static counts, not cycles. An H200 at
its memory roofline has 5.8 issue slots and 2.9 slots of the integer pipe for each weight; the bars (budget.py) keep to about
half of both.

--accept raises the budget to the measured figures, case by case: run it on every supported Triton, and read the diff. To
lower the budget, delete budget.json first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.sass.budget import PIPES, Row, accept, measure_all, read_budget, violations
from benchmarks.sass.cases import CASES
from benchmarks.system.environment import versions

COLUMNS = {"case": "case", "tile": "tile", "per_weight": "instr/w", **{pipe.lower(): pipe for pipe in PIPES}}
COLUMNS |= {"registers": "regs", "stack": "stack", "spill_bytes": "spill", "shared": "smem", "mma_kind": "mma"}


def show(rows: Sequence[Row]) -> str:
    """The table."""
    cells = [[row[name] for name in COLUMNS] for row in rows]
    return tabulate(cells, list(COLUMNS.values()), tablefmt="plain", floatfmt=".2f")


def main() -> int:
    """Print the table; with --check, exit 1 when a bar or the budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the bars and the budget")
    parser.add_argument("--accept", action="store_true", help="raise the budget to what is measured")
    parser.add_argument("--target", nargs="+", default=[], help="only these: sm_90 gfx942 ...")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.accept and arguments.target:
        parser.error("--accept writes the whole budget: leave out --target")
    cases = [case for case in CASES if not arguments.target or case.target in arguments.target]
    rows = measure_all(cases, arguments.processes)
    print(show(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({**versions(), "rows": rows}, indent=1) + "\n")
    if arguments.accept:
        accept(rows)
    found = violations(rows, read_budget()) if arguments.check else []
    for line in found:
        print(line)
    if arguments.check:
        print(f"{len(rows)} cases, {len(found)} over the bars or the budget, Triton {versions()['triton']}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
