"""Six-bit matmuls on this CPU beside F.linear and torch's int8 and int4: `python -m benchmarks.cpu [--quick]`.

Every call reads another copy of the weight; together they exceed --rotate megabytes, so that they come from memory and not
from cache. Providers alternate call by call, because the load of the machine changes; figures are medians over calls, with
the 20th and 80th percentile. GB/s counts the weight's bytes (0.75 or 2 or 4 each, and scales), beside the best of several
ways to read memory with torch.

It prints tables, and last one line of JSON. --csv and --json write files; `python -m benchmarks.cpu.plot` draws JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.cpu.providers import Provider, providers
from benchmarks.system.bandwidth import read_bandwidth
from benchmarks.system.environment import cpu

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (2048, 2048)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 512]
MOST_FOR_INTEGERS = 64
QUICK = ([(4096, 4096)], [1, 8, 64, 512])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@torch.inference_mode()
def main() -> None:
    """Parse, measure, print."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.clock == "cpu" else time.perf_counter
    bandwidth = read_bandwidth(clock)
    about = {**cpu(), "clock": arguments.clock, "read_gb_s": round(bandwidth, 1)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    shapes, batches = QUICK if arguments.quick else (SHAPES, BATCHES)
    rows: list[dict[str, Any]] = []
    for n, k in shapes:
        for row in measure(n, k, batches, arguments, clock):
            row["share_of_read"] = round(row["gb_s"] / bandwidth, 2)
            rows.append(row)
        show([row for row in rows if (row["n"], row["k"]) == (n, k)])
    if arguments.csv:
        write_csv(arguments.csv, rows, about)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}) + "\n")
    print(json.dumps({**about, "rows": rows}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, four batch sizes")
    parser.add_argument("--group-size", type=int, help="inputs that share a scale; without it a row")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--rotate", type=int, default=600, help="megabytes of copies of each weight")
    parser.add_argument("--calls", type=int, default=15, help="calls of every provider")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of activations")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: the thread's own time, for --threads 1 on a busy machine",
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu sees one thread: add --threads 1")
    return arguments


def measure(
    n: int, k: int, batches: list[int], arguments: argparse.Namespace, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """A row for every batch size and provider, for a weight [n, k]."""
    for name in arguments.dtypes:
        rivals = list(providers(n, k, arguments.group_size, DTYPES[name], arguments.rotate))
        for m in batches:
            x = torch.randn(m, k).to(DTYPES[name])
            # The integer ops are for decoding: with many rows they take a hundred times as long as F.linear.
            present = [p for p in rivals if m <= MOST_FOR_INTEGERS or not p.name.startswith("int")]
            for provider, taken in zip(present, _alternate(present, x, arguments.calls, clock), strict=True):
                p20, p50, p80 = (float(torch.tensor(taken).quantile(q)) for q in (0.2, 0.5, 0.8))
                yield {
                    **{"provider": f"{provider.name} {name}", "m": m, "n": n, "k": k},
                    **{"group_size": arguments.group_size if provider.name == "fp6" else None},
                    **{"ms_p50": round(p50 * 1e3, 4), "ms_p20": round(p20 * 1e3, 4), "ms_p80": round(p80 * 1e3, 4)},
                    "gb_s": round(provider.nbytes / p50 / 1e9, 2),
                }


def _alternate(rivals: Sequence[Provider], x: Tensor, count: int, clock: Callable[[], float]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in rivals]
    for i in range(count + 2):
        for provider, taken in zip(rivals, times, strict=True):
            start = clock()
            provider.call(x)
            if i >= 2:
                taken.append(clock() - start)
    return times


def show(rows: list[dict[str, Any]]) -> None:
    """A line per dtype and batch size: our milliseconds, and how many times as long the others take."""
    lines: list[dict[str, str]] = []
    for row in rows:
        name, dtype = row["provider"].rsplit(" ", 1)
        if name == "fp6":
            ours, line = row["ms_p50"], {"": dtype, "M": str(row["m"]), "fp6 ms": f"{row['ms_p50']:.3f}"}
            lines.append({**line, "of read": f"{row['share_of_read']:.0%}"})
        else:
            lines[-1][name] = f"{row['ms_p50'] / ours:.2f}x"
    print(f"\n{rows[0]['n']} x {rows[0]['k']}\n")
    print(tabulate(lines, "keys", tablefmt="plain", disable_numparse=True, stralign="right"))


def write_csv(path: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """A row per provider and shape, the environment repeated in each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    main()
