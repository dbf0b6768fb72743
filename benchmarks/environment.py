"""Where and when a figure was made: what every file of results says about itself."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parent.parent


def output(*command: str) -> str:
    """What `command`, run in this checkout, prints; empty where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, Any]:
    """Of the software, with commit and date. A commit ends in "-dirty" when tracked files differ from it."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "commit": output("git", "describe", "--always", "--dirty", "--exclude", "*"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def gpu() -> dict[str, Any]:
    """Of the current CUDA device. Clocks and limits are read as found; nothing is set."""
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
