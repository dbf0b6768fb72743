"""Commands that run one after another, each for a limited time, with a summary that is always written.

Each stage is a process of its own: one that hangs, crashes or runs out of memory takes no other with it. At the end of its
time it is interrupted (SIGINT, as Ctrl-C, so that pytest still prints its summary), then terminated, then killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.system import environment

PYTHON = (sys.executable, "-u", "-m")
PATIENCE = 5.0  # seconds after an interruption, and again after a termination


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    must_pass: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)


def command(
    name: str,
    doc: str | None,
    stages: Mapping[str, Callable[[Path, bool], Sequence[Stage]]],
    seconds: Mapping[str, float],
    results: Path | None = None,
) -> int:
    """The command line of `python -m benchmarks.NAME [WHAT]`, which runs `stages[WHAT]`; the first is the default.

    results: where a new folder is made unless --out gives one; without it --out must.
    Returns the exit code of `run_all`, or 2 on a machine without a GPU.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default=next(iter(stages)), choices=list(stages))
    parser.add_argument("--dry-run", action="store_true", help="the same commands on the CPU; times mean nothing")
    parser.add_argument("--out", type=Path, help="a folder for everything")
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print(f"benchmarks.{name}: no CUDA device on this machine, so nothing was run. --dry-run tries the wiring.")
        return 2
    about = {"kind": "stand-in"} if dry else {"kind": "measured", **environment.gpu()}
    about |= environment.versions() | {"cores": os.cpu_count()}
    if arguments.out is None and not dry and results is None:
        parser.error("--out: a folder, please")
    title = f"{about.get('device', 'stand-in')}_{about['date']}".replace(" ", "_").replace(":", "")
    base = Path(tempfile.mkdtemp()) if dry or results is None else results
    folder = (arguments.out or base / title).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return run_all(stages[arguments.what](folder, dry), folder, about, seconds[arguments.what])


def run_all(todo: Sequence[Stage], folder: Path, about: Mapping[str, Any], seconds: float) -> int:
    """Run every stage, in its own time or what is left of `seconds`. All output is printed and kept in log.txt; summary.json
    is written after each stage.

    Returns an exit code: 1 when a stage that must pass did not.
    """
    until = time.monotonic() + seconds
    done: list[dict[str, Any]] = []
    for stage in todo:
        print(f"--- {stage.name}: {' '.join(stage.command)}", flush=True)
        done.append(run(stage, folder, min(stage.seconds, until - time.monotonic())))
        (folder / "summary.json").write_text(json.dumps({**about, "stages": done}, indent=1) + "\n")
    print("--- summary")
    for row in done:
        print(f"{row['stage']:12} exit {row['exit']!s:12} {row['seconds']:6.1f} s  {row['last_line']}")
    print(folder)
    broken = {stage.name for stage in todo if stage.must_pass} & {row["stage"] for row in done if row["exit"] != 0}
    return int(bool(broken))


def run(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """Run `stage` for at most `seconds`; returns its entry of the summary."""
    start, path = time.monotonic(), folder / "log.txt"
    with path.open("a") as log:
        log.write(f"--- {stage.name}\n")
        log.flush()
        where = log.tell()
        code = _exit(stage, log, seconds)
    text = path.read_bytes()[where:].decode(errors="replace")
    print(text, flush=True)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return {"stage": stage.name, "exit": code, "seconds": round(time.monotonic() - start, 1), "last_line": last}


def _exit(stage: Stage, log: Any, seconds: float) -> int | str:
    """The exit code, "out of time", or "not found"."""
    if seconds <= 0:
        return "out of time"
    try:
        # A group of its own, so that a stage's own children stop with it.
        process = subprocess.Popen(
            stage.command,
            cwd=environment.ROOT,
            env={**os.environ, **stage.environ},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except FileNotFoundError:
        return "not found"
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _stop(process)
        return "out of time"
    except BaseException:  # interrupted: stop the stage, too
        _stop(process)
        raise


def _stop(process: subprocess.Popen[Any]) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
            break
    with contextlib.suppress(ProcessLookupError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)


def gpu_tests() -> list[str]:
    """The test files with the mark gpu, kernels first. Others may import packages that are only for development."""
    files = sorted((environment.ROOT / "tests").glob("test_*.py"), key=lambda path: ("kernels" not in path.name, path))
    return [str(path.relative_to(environment.ROOT)) for path in files if "mark.gpu" in path.read_text()]
