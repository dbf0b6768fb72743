"""Run a generated CUDA module on CPU tensors, in a subprocess where Triton interprets.

Triton decides at import whether `@triton.jit` compiles or interprets, and a test process has imported it long ago, so
the work is done by interpreter.py in a process of its own; text and tensors travel through files. A start costs a few
seconds: `run_interpreted_all` shares one among several modules.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


def run_interpreted(code: str, inputs: Sequence[Any], imports: Sequence[str] = ()) -> list[Any]:
    """What `call(inputs)` of the generated module returns; `imports` are modules that define ops it calls."""
    return run_interpreted_all([(code, inputs)], imports)[0]


def run_interpreted_all(jobs: Iterable[tuple[str, Sequence[Any]]], imports: Sequence[str] = ()) -> list[list[Any]]:
    """The outputs of each (code, inputs), all from one subprocess."""
    with tempfile.TemporaryDirectory() as directory:
        jobs_path, results_path = Path(directory, "jobs.pt"), Path(directory, "results.pt")
        torch.save({"jobs": [(code, list(inputs)) for code, inputs in jobs], "imports": list(imports)}, jobs_path)
        run_with_interpreter(f"{__package__}.interpreter", str(jobs_path), str(results_path))
        return torch.load(results_path)


def run_with_interpreter(module: str, *arguments: str) -> str:
    """Run `python -m module` in a process where Triton interprets; what it printed."""
    # The child must find what the parent finds, wherever pytest was started.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{module} failed in the interpreter:\n{done.stderr}")
    return done.stdout
