"""What a torch device is to the choice of a tile: its architecture, its multiprocessors, and whether wgmma may be used."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from fp6_compile.formats import Format
from fp6_compile.kernels.selection import selftest
from fp6_compile.kernels.selection.tuned import tuned
from fp6_compile.kernels.triton.config import LARGEST_MMA_M, Config, Device, candidates


@functools.cache
def describe(device: torch.device) -> Device:
    """Architecture and multiprocessors of a GPU; of anything else a Hopper's, for Triton's interpreter. No wgmma."""
    if device.type != "cuda":
        return Device()
    about = torch.cuda.get_device_properties(device)
    arch = f"sm_{about.major}{about.minor}" if torch.version.hip is None else about.gcnArchName.split(":")[0]
    return Device(arch, about.multi_processor_count, name=about.name)


def may_use_wgmma(device: torch.device, dtype: torch.dtype, fmt: Format, group_size: int | None) -> bool:
    """Whether wgmma exists on `device` and computes right there; the answer decides on code, and is part of cache keys."""
    if describe(device).arch != "sm_90" or dtype == torch.float32:
        return False
    # The test launches kernels, which a stream that is being recorded must not. Its warm-up has asked already.
    return selftest.passes(device, dtype, fmt, group_size, may_launch=not torch.cuda.is_current_stream_capturing())


def choices(
    device: torch.device, m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, fmt: Format
) -> tuple[Config | None, ...]:
    """Tiles for a problem on `device`, the measured one and `config.candidates`; the first is to be taken without timing.

    Asked on every call of the launcher: each step is a look-up after the first time.
    """
    about = describe(device)
    if m > LARGEST_MMA_M:
        about = replace(about, wgmma=may_use_wgmma(device, dtype, fmt, group_size))
    others = candidates(m, n, k, group_size, dtype, about)
    measured = tuned(about.name, m, n, k, group_size, dtype, fmt)
    if not measured or (measured[0] is not None and measured[0].JOIN > 1 and not about.wgmma):
        return others
    return measured + tuple(tile for tile in others if tile != measured[0])[:5]
