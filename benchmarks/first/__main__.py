"""The first quarter of an hour on a GPU: exactness, then times, in two commands.

`python -m benchmarks.first --out FOLDER`, under nine minutes:

    warm     kernels compiled into Triton's cache, as many at once as there are cores
    exact    every code and integer products, to the last bit, by every kind of tile; exact.json
    tests    tests/test_kernels_gpu.py, in parallel where pytest-xdist is installed
    times    M = 1, 64, 256, 16, 1024 on four weights beside cuBLAS and, if installed, Humming; linear.json
    tune     the fastest tiles of two weights; tuned.json
    decode   the decode loop of an 8 B Llama shape, fp6 and inductor; decode_8b.json

`python -m benchmarks.first rest --out FOLDER`, four minutes:

    backend  the tests of compiled models
    profile  ncu on one launch at M = 1
    race     compute-sanitizer's racecheck on a launch whose K is split
    times    the same weights in E3M2; linear_e3m2.json

Nothing is downloaded; torch, Triton, pytest and this checkout are enough, neither git's history nor an installation is
needed (FP6_COMMIT may name the commit). At most seven files are written. A stage that fails does not stop the next; the
exit code is 1 when something was not exact or a test failed, and 2 on a machine without a GPU.

--dry-run goes through the same commands on a CPU, in Triton's interpreter and with stand-ins: its times mean nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from benchmarks.linear.shapes import FIRST_BATCHES
from benchmarks.system.stages import PYTHON, Stage, command, gpu_tests

SECONDS = {"kernels": 525.0, "rest": 235.0}


def kernels(folder: Path, dry: bool) -> list[Stage]:
    """The stages of the first command."""
    out = [
        str(folder / f"{'stand-in_' if dry else ''}{name}.json") for name in ("exact", "linear", "tuned", "decode_8b")
    ]
    exact, linear, tuned, decode = out
    flag = ("--dry-run",) if dry else ()
    tune = ("--shapes", "8192x8192", "4096x4096", "--m", "8", "16", "64", "128", "256", "--dtype", "fp16")
    size = ("tiny", "--device", "cpu", "--tokens", "4", "--rounds", "1") if dry else ("8b", "--device", "cuda")
    backends = ("fp6",) if dry else ("fp6", "inductor")
    loop = ("--size", *size, "--once", "--backends", *backends, "--out", decode)
    return [
        Stage("warm", (*PYTHON, "benchmarks.first.warm", *flag), 60),
        Stage("exact", (*PYTHON, "benchmarks.first.exact", "--out", exact, *flag), 60, True, _interpreter(dry)),
        Stage("tests", _pytest(gpu_tests()[:1]), 90, True),
        Stage("times", _linear("e2m3", linear, 110, dry), 120, True),
        Stage("tune", (*PYTHON, "benchmarks.tune", *tune, "--out", tuned, *flag), 85),
        Stage("decode", (*PYTHON, "benchmarks.decode", *loop), 170),
    ]


def rest(folder: Path, dry: bool) -> list[Stage]:
    """The stages of the second command."""
    out = str(folder / f"{'stand-in_' if dry else ''}linear_e3m2.json")
    one = (*PYTHON, "benchmarks.first.one", *(("--dry-run",) if dry else ()))
    profile = (
        ()
        if dry
        else ("ncu", "--clock-control", "none", "--set", "full", "--kernel-name", "mm_kernel", "--launch-count", "1")
    )
    race = () if dry else ("compute-sanitizer", "--tool", "racecheck")
    return [
        Stage("backend", _pytest([name for name in gpu_tests() if "kernels" not in name]), 70, True),
        Stage("profile", (*profile, *one, "--m", "1"), 40, False, _interpreter(dry)),
        Stage("race", (*race, *one, "--m", "1", "--size", "2048"), 40, False, _interpreter(dry)),
        Stage("times", _linear("e3m2", out, 75, dry), 85),
    ]


def _interpreter(dry: bool) -> dict[str, str]:
    return {"TRITON_INTERPRET": "1"} if dry else {}


def _pytest(files: list[str]) -> tuple[str, ...]:
    several = importlib.util.find_spec("xdist") and torch.cuda.is_available()
    workers = ("--numprocesses", "8") if several else ()
    return (*PYTHON, "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", *workers, *files)


def _linear(format: str, out: str, seconds: int, dry: bool) -> tuple[str, ...]:
    what = ("--dtype", "fp16", "--format", format, "--providers", "linear", "fp6", "humming", "--seconds", str(seconds))
    how = ("--dry-run",) if dry else ("--quick", "--m", *map(str, FIRST_BATCHES))
    return (*PYTHON, "benchmarks.linear", *what, *how, "--out", out)


def main() -> int:
    """See the module's docstring for the exit code."""
    return command("first", __doc__, {"kernels": kernels, "rest": rest}, SECONDS)


if __name__ == "__main__":
    sys.exit(main())
