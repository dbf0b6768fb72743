"""The figures of each case, and what limits them.

*Bars* are fixed limits, in this file. The *budget* (budget.json) is what each case took when it was last accepted: a figure
may exceed it by 2 %, memory and the matrix instruction not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.sass.cases import CASES, SPLIT, Case, compile_case
from benchmarks.system.environment import versions

BUDGET = Path(__file__).with_name("budget.json")
SLACK = 1.02
PIPES = ("ALU", "FMA", "MEM", "MMA", "UNI", "OTHER")
# Instructions a weight. Of these E3M2's unpack is 1.3, and 1.8 in BF16; E2M3's 1.8 and 2.3; the MMAs are m / 64.
BARS = {("e3m2", "fp16"): 2.2, ("e3m2", "bf16"): 2.9, ("e2m3", "fp16"): 2.6, ("e2m3", "bf16"): 3.1}
ALU_BAR = 1.45
# ptxas aims at register counts where more warps fit (80, 168), and saves a few addresses to get there: that is the little
# stack allowed. A tile that is too large spills its sums, and hundreds of bytes.
STACK_BAR = 24
Row = dict[str, Any]


def measure(case: Case) -> Row:
    """The figures of `case`, compiled by the installed Triton."""
    kernel = compile_case(case)
    code, loop, tile = kernel.code, kernel.code.hot_loop, kernel.tile
    pipes = loop.pipes()
    stores, loads = code.spill_bytes
    return {
        "case": case.name,
        "tile": f"{tile.BLOCK_N}x{tile.BLOCK_M} {tile.num_warps}w {tile.num_stages}s k/{tile.SPLIT_K}",
        "per_weight": round(kernel.per_weight(len(loop)), 3),
        **{pipe.lower(): round(kernel.per_weight(pipes[pipe]), 3) for pipe in PIPES},
        "registers": code.registers,
        "stack": code.stack_bytes,
        "spill_bytes": stores + loads,
        "loop_spills": round((loop.count("STL") + loop.count("LDL")) / len(loop), 3),
        "shared": code.shared_bytes,
        "mma_kind": code.mma,
        "unfinished": sum(
            pending != "0" for pending in re.findall(r"warp_group_dot_wait.*pendings = (\d+)", code.ttgir)
        ),
    }


def measure_all(cases: Sequence[Case] = tuple(CASES), processes: int = 2) -> list[Row]:
    """The rows of `cases`, in their order, compiled by as many processes."""
    if processes == 1:
        return [measure(case) for case in cases]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, cases, chunksize=4))


def bars(case: Case, row: Row) -> Iterator[str]:
    """What breaks a bar."""
    if case.target.startswith("sm"):
        if row["mma_kind"] != "HMMA" and not (case.m > 64 and row["mma_kind"] == "HGMMA"):
            yield f"{row['mma_kind']} at M = {case.m}, where only mma.sync (HMMA) is trusted"
        if row["unfinished"]:
            yield f"{row['unfinished']} wgmma that may still run while the next weights are unpacked"
        if row["stack"] > STACK_BAR:
            yield f"{row['stack']} bytes of stack, the bar is {STACK_BAR}"
        if row["loop_spills"] > 0.02:
            yield f"{row['loop_spills']:.0%} of the hot loop are local loads and stores"
    if case.target == "sm_90" and case.m <= 16 and case.n >= SPLIT and case.group_size is None and case.k % 256 == 0:
        bar = BARS[case.format, case.dtype]
        if row["per_weight"] > bar:
            yield f"{row['per_weight']} instructions a weight, the bar is {bar}"
        if row["alu"] > ALU_BAR:
            yield f"{row['alu']} on the integer pipe a weight, the bar is {ALU_BAR}"
        if case.format == "e3m2" and row["spill_bytes"]:
            yield f"{row['spill_bytes']} bytes spilled"


def over_budget(row: Row, budget: Mapping[str, Row]) -> Iterator[str]:
    """What exceeds the budget of the row's case."""
    if row["case"] not in budget:
        yield f"no budget; read the table, then: python -m benchmarks.sass --accept ({BUDGET.name})"
        return
    for figure, limit in budget[row["case"]].items():
        if figure == "mma_kind":
            if row[figure] not in limit:
                yield f"{figure} {row[figure]}, the budget is {' or '.join(limit)}"
        elif row[figure] > limit * (1 if figure in ("stack", "shared") else SLACK):
            yield f"{figure} {row[figure]}, the budget is {limit}"


def violations(rows: Sequence[Row], budget: Mapping[str, Row], cases: Sequence[Case] = tuple(CASES)) -> list[str]:
    """A line for each figure that breaks a bar or exceeds the budget, and for each budget without a case."""
    by_name = {case.name: case for case in cases}
    found = [f"{row['case']}: {what}" for row in rows for what in bars(by_name[row["case"]], row)]
    found += [f"{row['case']}: {what}" for row in rows for what in over_budget(row, budget)]
    return found + [f"{name}: in the budget, but no longer a case" for name in budget if name not in by_name]


def read_budget(path: Path = BUDGET) -> dict[str, Row]:
    """The budget by case name; empty where there is no file."""
    return json.loads(path.read_text())["cases"] if path.exists() else {}


def accept(rows: Sequence[Row], path: Path = BUDGET) -> None:
    """Raise the budget in `path` to `rows` where they are higher, add new cases, drop those that are gone."""
    old = read_budget(path)
    seen = sorted({*(json.loads(path.read_text())["triton"] if path.exists() else ()), versions()["triton"]})
    lines = [f"{json.dumps(row['case'])}: {json.dumps(_raised(row, old.get(row['case'])))}" for row in rows]
    about = "The most that a supported Triton took. python -m benchmarks.sass --accept writes this; read the diff."
    body = ",\n  ".join(lines)
    path.write_text(f'{{"about": "{about}",\n "triton": {json.dumps(seen)},\n "cases": {{\n  {body}\n}}}}\n')


BUDGETED = ("per_weight", "alu", "fma", "mem", "registers", "stack", "shared")


def _raised(row: Row, old: Row | None) -> Row:
    figures = {name: max(row[name], old[name]) if old else row[name] for name in BUDGETED}
    return {**figures, "mma_kind": sorted({row["mma_kind"], *(old["mma_kind"] if old else ())})}
