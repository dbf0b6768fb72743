"""All tests and measurements on a GPU machine, in two commands of under eight minutes each.

`python -m benchmarks.all`:

    tests    the tests marked gpu: first the 64 codes, bit for bit, and integer products, exactly
    quick    benchmarks.linear on four weights, FP16
    linear   all weights and both dtypes at four batch sizes, until the time is up, into the same file
    decode   benchmarks.decode, its smallest size

`python -m benchmarks.all decode`: benchmarks.decode, from empty caches, until the time is up:

    8b       fp6, inductor and eager, batch 1; then 70b, fp6 alone, where its 53 GB fit; then 1b, batch 1 and 16

Nothing is downloaded; only torch, Triton, pytest and this checkout are needed. Results are written into one new folder of
benchmarks/results: the output of each stage, rows as they are measured, summary.json after each stage. Failed tests do not
stop the benchmarks; the exit code is then 1, and 2 on a machine without a GPU.

--dry-run runs the same commands without a GPU, on the CPU, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.linear.results import FOLDER
from benchmarks.system import environment

SECONDS = 465.0  # for all stages; starting Python and writing take the rest of eight minutes
KILL_AFTER = 5.0  # a stage that overruns is asked to stop, and killed after this long


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    must_pass: bool = False


PYTHON = (sys.executable, "-u", "-m")
BYTES_OF_70B = 70.6e9 * 0.77  # of weights and scales, and room for a cache


def decode_stages(folder: Path, dry_run: bool) -> list[Stage]:
    """Decode loops. The results of each are a file of its own, written as they come."""
    how = ("--device", "cpu", "--tokens", "4", "--rounds", "1") if dry_run else ("--device", "cuda")
    memory = 0 if dry_run else torch.cuda.get_device_properties(0).total_memory

    def stage(size: str, seconds: float, *arguments: str) -> Stage:
        name = f"{'stand-in_' if dry_run else ''}decode_{size}"
        files = ("--out", str(folder / f"{name}.json"), "--plot", str(folder / f"{name}.png"))
        command = (*PYTHON, "benchmarks.decode", "--size", "tiny" if dry_run else size, *how, *files)
        return Stage(f"decode_{size}", (*command, *arguments), seconds, must_pass=True)

    # Six bits first: a stage that runs out of time keeps what it has.
    found = [stage("8b", 215, "--backends", "fp6", "inductor", "eager")]
    if memory > BYTES_OF_70B:
        found.append(stage("70b", 150, "--backends", "fp6", "--once"))
    return [*found, stage("1b", 100, "--once", "--batch", "1", "16")]


def stages(folder: Path, dry_run: bool) -> list[Stage]:
    """Tests and matmuls, in this order."""
    python = PYTHON
    files = gpu_tests()[:1] if dry_run else gpu_tests()
    tests = (*python, "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", *files)
    out = str(folder / ("stand-in_linear.json" if dry_run else "linear.json"))
    how = ("--dry-run",) if dry_run else ()
    linear = (*python, "benchmarks.linear", "--out", out, *how)
    found = [
        Stage("tests", tests, 210, must_pass=True),
        Stage("quick", (*linear, "--quick", "--dtype", "fp16", "--seconds", "60"), 75, must_pass=True),
        Stage("linear", (*linear, "--resume", "--m", "1", "16", "64", "256", "--seconds", "95"), 110, must_pass=True),
    ]
    return [*found, Stage("decode", (*python, "benchmarks.decode", "--once"), 70)]


def gpu_tests() -> list[str]:
    """The test files with the mark gpu. Others may import packages that are only installed for development."""
    files = sorted((environment.ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(environment.ROOT)) for path in files if "mark.gpu" in path.read_text()]


def run(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """Run `stage` for at most `seconds`; its output is printed and kept in NAME.txt. Returns its entry of the summary."""
    start = time.monotonic()
    with (folder / f"{stage.name}.txt").open("w") as log:
        # A group of its own, so that a stage's own children stop with it.
        process = subprocess.Popen(
            stage.command, cwd=environment.ROOT, stdout=log, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        code = _wait(process, seconds)
    text = (folder / f"{stage.name}.txt").read_text(errors="replace")
    print(text, flush=True)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return {"stage": stage.name, "exit": code, "seconds": round(time.monotonic() - start, 1), "last_line": last}


def _wait(process: subprocess.Popen[Any], seconds: float) -> int | str:
    """The exit code, or "out of time"."""
    try:
        return process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        _stop(process)
        return "out of time"
    except BaseException:  # interrupted: stop the stage, too
        _stop(process)
        raise


def _stop(process: subprocess.Popen[Any]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(KILL_AFTER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(todo: Sequence[Stage], folder: Path, about: dict[str, Any], seconds: float = SECONDS) -> int:
    """Run every stage, in its own time or what is left of `seconds`; write summary.json after each. Returns an exit code."""
    until = time.monotonic() + seconds
    done: list[dict[str, Any]] = []
    for stage in todo:
        print(f"--- {stage.name}: {' '.join(stage.command[3:])}", flush=True)
        done.append(run(stage, folder, min(stage.seconds, until - time.monotonic())))
        (folder / "summary.json").write_text(json.dumps({**about, "stages": done}, indent=1) + "\n")
    print("--- summary")
    for row in done:
        print(f"{row['stage']:8} exit {row['exit']!s:12} {row['seconds']:6.1f} s  {row['last_line']}")
    print(folder)
    broken = {stage.name for stage in todo if stage.must_pass} & {row["stage"] for row in done if row["exit"] != 0}
    return int(bool(broken))


def main() -> int:
    """See the module's docstring for the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="kernels", choices=["kernels", "decode"])
    parser.add_argument("--dry-run", action="store_true", help="the same commands on the CPU; times mean nothing")
    parser.add_argument("--out", type=Path, help="a new folder for everything")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("benchmarks.all: no CUDA device on this machine, so nothing was run. --dry-run tries the wiring.")
        return 2
    kind = {"kind": "stand-in"} if arguments.dry_run else {"kind": "measured", **environment.gpu()}
    about = {**kind, **environment.versions()}
    name = f"{about.get('device', 'stand-in')}_{about['date']}".replace(" ", "_").replace(":", "")
    folder = arguments.out or (Path(tempfile.mkdtemp()) if arguments.dry_run else FOLDER) / name
    folder.mkdir(parents=True)
    todo = decode_stages if arguments.what == "decode" else stages
    return run_all(todo(folder.resolve(), arguments.dry_run), folder, about)


if __name__ == "__main__":
    sys.exit(main())
