"""Where and when a figure was measured, for the files of results."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

from fp6_compile import ops

ROOT = Path(__file__).parents[2]


def output(*command: str) -> str:
    """The output of `command`, run in this checkout; empty if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, Any]:
    """Versions of the software, commit and date."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def commit() -> str:
    """The commit of this checkout, with "-dirty" when tracked files differ; FP6_COMMIT where the checkout has no history."""
    return output("git", "describe", "--always", "--dirty", "--exclude", "*") or os.environ.get("FP6_COMMIT", "")


def gpu() -> dict[str, Any]:
    """Properties of the current CUDA device. Clocks and limits are read, not set."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    answer = output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
        **dict(zip(fields, answer.splitlines()[0].split(", "), strict=False) if answer else ()),
    }


def cpu() -> dict[str, Any]:
    """This CPU, the kernel's code paths on it, torch, commit and day."""
    return {
        "cpu": _cpu_name(),
        "paths": " ".join(torch.ops.fp6.cpu_paths()) if ops.load() else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    names = [line for line in output("lscpu").splitlines() if line.startswith("Model name")]
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
