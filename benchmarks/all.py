"""All tests and measurements on a GPU machine, in two commands of under eight minutes each. (On a machine that is lent for
minutes, `python -m benchmarks.first`.)

`python -m benchmarks.all`:

    tests    the tests marked gpu, the kernels' first
    quick    benchmarks.linear on four weights, FP16
    linear   all weights and both dtypes at four batch sizes, until the time is up, into the same file
    decode   benchmarks.decode, its smallest size

`python -m benchmarks.all decode`: benchmarks.decode, from empty caches, until the time is up:

    8b       fp6, inductor and eager, batch 1; then 70b, fp6 alone, where its 53 GB fit; then 1b, batch 1 and 16

Nothing is downloaded; only torch, Triton, pytest and this checkout are needed. Results are written into one new folder of
benchmarks/results: log.txt with all output, rows as they are measured, summary.json after each stage. Failed tests do not
stop the benchmarks; the exit code is then 1, and 2 on a machine without a GPU.

--dry-run runs the same commands without a GPU, on the CPU, in a temporary folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.linear.results import FOLDER
from benchmarks.system.stages import PYTHON, Stage, command, gpu_tests

SECONDS = 465.0  # for all stages; starting Python and writing take the rest of eight minutes


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
    files = gpu_tests()[:1] if dry_run else gpu_tests()
    tests = (*PYTHON, "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", *files)
    out = str(folder / ("stand-in_linear.json" if dry_run else "linear.json"))
    how = ("--dry-run",) if dry_run else ()
    linear = (*PYTHON, "benchmarks.linear", "--out", out, *how)
    found = [
        Stage("tests", tests, 210, must_pass=True),
        Stage("quick", (*linear, "--quick", "--dtype", "fp16", "--seconds", "60"), 75, must_pass=True),
        Stage("linear", (*linear, "--resume", "--m", "1", "16", "64", "256", "--seconds", "95"), 110, must_pass=True),
    ]
    return [*found, Stage("decode", (*PYTHON, "benchmarks.decode", "--once"), 70)]


def main() -> int:
    """See the module's docstring for the exit code."""
    what = {"kernels": stages, "decode": decode_stages}
    return command("all", __doc__, what, dict.fromkeys(what, SECONDS), FOLDER)


if __name__ == "__main__":
    sys.exit(main())
