"""Six-bit matmuls on this CPU beside F.linear in BF16, FP16 and FP32: `python -m benchmarks.cpu [--quick]`.

Weights rotate: every call reads another copy, of as many as exceed --rotate megabytes, so that decoding is timed from memory
and not from cache. Providers alternate call by call, because other work on the machine comes and goes; figures are medians
over calls, with the 20th and 80th percentile. GB/s counts the weight's bytes (0.75 or 2 or 4 each, and scales), and is set
against the best of several ways to read memory with torch.

A table for people, and last one line of JSON. --csv and --json write files.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import output
from fp6_compile.kernels.cpu import mm as cpu

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (2048, 2048)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 512]
QUICK = ([(4096, 4096)], [1, 8, 64, 512])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.clock == "cpu" else time.perf_counter
    bandwidth = read_bandwidth(clock)
    about = {**environment(), "clock": arguments.clock, "read_gb_s": round(bandwidth, 1)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    shapes, batches = QUICK if arguments.quick else (SHAPES, BATCHES)
    rows = []
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


def environment() -> dict[str, Any]:
    """Where and when."""
    return {
        "cpu": _cpu_name(),
        "paths": " ".join(cpu.supported_paths()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    names = [line for line in output("lscpu").splitlines() if line.startswith("Model name")]
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def read_bandwidth(clock: Callable[[], float]) -> float:
    """GB/s of reading a gigabyte, by the fastest of several reductions."""
    memory = torch.ones(1 << 28, dtype=torch.int32)
    reads: list[Callable[[], Any]] = [
        memory.amax,
        memory.view(torch.float32).sum,
        lambda: memory.view(torch.int8).amax(),
    ]
    best = 0.0
    for read, _ in itertools.product(reads, range(4)):
        start = clock()
        read()
        best = max(best, memory.nbytes / (clock() - start) / 1e9)
    return best


def measure(
    n: int, k: int, batches: list[int], arguments: argparse.Namespace, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """A row for every batch size and provider, for a weight [n, k]."""
    packed, size = _packed(n, k, arguments.group_size, arguments.rotate)
    for name in arguments.dtypes:
        weights = _copies(torch.randn(n, k).to(DTYPES[name]), arguments.rotate)
        for m in batches:
            x = torch.randn(m, k).to(DTYPES[name])
            calls = [partial(_fp6, x, packed), partial(_linear, x, weights)]
            times = _alternate(calls, arguments.calls, clock)
            sizes = [size, n * k * x.element_size()]
            for provider, nbytes, taken in zip((f"fp6 {name}", f"linear {name}"), sizes, times, strict=True):
                p20, p50, p80 = (float(torch.tensor(taken).quantile(q)) for q in (0.2, 0.5, 0.8))
                yield {
                    **{"provider": provider, "m": m, "n": n, "k": k, "group_size": arguments.group_size},
                    **{"ms_p50": round(p50 * 1e3, 4), "ms_p20": round(p20 * 1e3, 4), "ms_p80": round(p80 * 1e3, 4)},
                    "gb_s": round(nbytes / p50 / 1e9, 2),
                }


def _fp6(x: Tensor, packed: Iterator[Any]) -> Tensor:
    return cpu.mm(x, *next(packed))


def _linear(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return F.linear(x, next(weights))


def _alternate(calls: Sequence[Callable[[], Any]], count: int, clock: Callable[[], float]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in calls]
    for i in range(count + 2):
        for call, taken in zip(calls, times, strict=True):
            start = clock()
            call()
            if i >= 2:
                taken.append(clock() - start)
    return times


def _copies(weight: Tensor, megabytes: int) -> Iterator[Tensor]:
    return itertools.cycle([weight.clone() for _ in range(2 + megabytes * 1_000_000 // weight.nbytes)])


def _packed(n: int, k: int, group_size: int | None, megabytes: int) -> tuple[Iterator[Any], int]:
    """Endless (w4, w2, scale, format, group_size), and their bytes. Any bytes are a weight."""
    from fp6_compile.formats import FORMATS

    w4, w2 = (torch.randint(0, 256, (n // 4, k // 64, planes * 64), dtype=torch.uint8) for planes in (2, 1))
    scale = torch.rand(-(-k // group_size) if group_size else 1, n)
    copies = 2 + megabytes * 1_000_000 // (w4.nbytes + w2.nbytes)
    weights = [
        (w4.clone().unflatten(2, (2, 64)), w2.clone(), scale.clone(), FORMATS["e3m2"], group_size)
        for _ in range(copies)
    ]
    return itertools.cycle(weights), w4.nbytes + w2.nbytes + scale.nbytes


def show(rows: list[dict[str, Any]]) -> None:
    """One line per batch size and dtype."""
    print(f"\n{rows[0]['n']} x {rows[0]['k']}{'':8}fp6 ms  linear ms    ratio   fp6 GB/s  of read")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        ratio = theirs["ms_p50"] / ours["ms_p50"]
        label = f"{theirs['provider'].split()[1]} M = {ours['m']}"
        print(
            f"  {label:15} {ours['ms_p50']:10.3f} {theirs['ms_p50']:10.3f} {ratio:7.2f}x "
            f"{ours['gb_s']:10.1f} {ours['share_of_read']:7.0%}",
            flush=True,
        )


def write_csv(path: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """A row per provider and shape, the environment repeated in each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    main()
