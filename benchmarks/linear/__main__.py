"""Six-bit matmuls on a GPU beside cuBLAS and other packages, if installed: `python -m benchmarks.linear [--quick]`.

Weights of language models, M = 1 to 4096, two measures (timing.py), every provider in turn on the same problem in one run.
GB/s counts the fewest bytes that the problem can move (weight, scales, x and y once each), and is compared with a copy on
the device, measured first. Each of our results is compared with float32 before it is timed. Rows are written as they are
measured.

Without a GPU: --simulate sm_90 predicts times from instruction counts and bytes (simulate.py); every row is marked as such.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.linear import simulate, timing
from benchmarks.linear.bench import HEAD, Bench, Problem, line
from benchmarks.linear.providers import PROVIDERS, missing
from benchmarks.linear.results import FOLDER, Results
from benchmarks.linear.shapes import BATCHES, QUICK, QUICK_BATCHES, SHAPES, get_shape
from benchmarks.system import environment


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four shapes, eight batch sizes")
    parser.add_argument("--shapes", nargs="+", type=get_shape, help=f"NxK or {', '.join(s.name for s in SHAPES)}")
    parser.add_argument("--m", nargs="+", type=int, help="batch sizes")
    parser.add_argument("--dtype", nargs="+", default=["fp16", "bf16"], choices=["fp16", "bf16"], help="of activations")
    parser.add_argument("--format", default="e3m2", choices=["e3m2", "e2m3"])
    parser.add_argument("--group-size", type=int, help="inputs that share a scale; without it a row")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after that long, and say what is left"
    )
    parser.add_argument("--out", type=Path, help="the .json file; the .csv file lies beside it")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that --out has")
    parser.add_argument("--simulate", choices=simulate.GPUS, help="no GPU: predict for this architecture")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: run the same code on the CPU, on a tiny weight")
    return parser


def main() -> int:
    """Exit code 1 when one of our own results is wrong or fails, 2 when there is no GPU."""
    arguments = _parser().parse_args()
    shapes = arguments.shapes or (QUICK if arguments.quick else SHAPES)
    batches = arguments.m or (QUICK_BATCHES if arguments.quick else BATCHES)
    if arguments.dry_run:
        shapes, batches = arguments.shapes or [get_shape("256x512")], arguments.m or [1, 3]
    how = (arguments.format, arguments.group_size)
    problems = [Problem(shape, dtype, *how) for shape in shapes for dtype in arguments.dtype]
    if arguments.simulate:
        return _predict(arguments, problems, batches)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("benchmarks.linear: no CUDA device. --simulate sm_90 predicts; --dry-run tries the wiring on the CPU.")
        return 2
    return _measure(arguments, problems, batches)


def _measure(arguments: argparse.Namespace, problems: Sequence[Problem], batches: Sequence[int]) -> int:
    until = time.monotonic() + arguments.seconds
    device: timing.Device = timing.Cpu() if arguments.dry_run else timing.Gpu()
    about = _about(device)
    results = Results(arguments.out or _name(about), about, arguments.resume)
    print(*(f"{key}: {value}" for key, value in results.about.items()), HEAD, sep="\n")
    bench = Bench(device, results, [name for name in arguments.providers if not missing(name)], until)
    for dtype in arguments.dtype:
        bench.host(dtype)
    # In a hurry by batch size over all weights, so that a cut loses batches and not weights; else a weight at a time,
    # because the rings of all of them together may not fit.
    for group in [problems] if arguments.quick else [[problem] for problem in problems]:
        bench.sweep(group, batches)
    for name in filter(missing, arguments.providers):
        print(f"{name}: not installed")
    if bench.left_out:
        print(f"out of time: {len(bench.left_out)} left out, from {bench.left_out[0]} on")
    for failure in bench.failed:
        print(failure)
    print(f"{len(results.rows)} rows in {results.path}")
    return int(any(failure.startswith("fp6 ") for failure in bench.failed))


def _about(device: timing.Device) -> dict[str, Any]:
    """What the file says about the run. The device's rates are measured each time, also when a run is resumed."""
    if device.kind == "stand-in":
        found: dict[str, Any] = {"kind": device.kind, "device": "CPU stand-in: times mean nothing"}
        found |= environment.versions() | timing.ceilings(device, nbytes=1 << 20, size=64)
    else:
        found = {"kind": device.kind, **environment.gpu(), **environment.versions(), **timing.ceilings(device)}
    return {**found, **{name: "not installed" for name in PROVIDERS if missing(name)}}


def _name(about: dict[str, Any]) -> Path:
    """A new file in benchmarks/results, or in a temporary folder where nothing is measured."""
    stamp = about["date"].replace(":", "")
    if about["kind"] != "measured":
        return Path(tempfile.mkdtemp()) / f"{about['kind']}_linear_{stamp}.json"
    return FOLDER / f"linear_{about['device'].replace(' ', '_')}_{stamp}.json"


def _predict(arguments: argparse.Namespace, problems: Sequence[Problem], batches: Sequence[int]) -> int:
    about = simulate.about(arguments.simulate)
    results = Results(arguments.out, about, arguments.resume) if arguments.out else None
    print(*(f"{key}: {value}" for key, value in about.items()), HEAD, sep="\n")
    for problem in problems:
        for m in batches:
            for row in simulate.predict(problem, m, arguments.simulate):
                print(line(row))
                if results:
                    results.add(row)
    print("All of these are predictions of a model; none was measured.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
