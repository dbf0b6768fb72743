"""Compile the kernels that the other stages will launch into Triton's cache, in as many processes as there are cores.

A process compiles for a target that it is told, without a CUDA context, and any other process finds the result: compiling
costs one to two CPU seconds a kernel, which a GPU would wait for.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from benchmarks.linear.shapes import FIRST_BATCHES, QUICK
from fp6_compile.fake_gpu.driver import fake_target
from fp6_compile.formats import get_format
from fp6_compile.kernels.triton.config import Config, Device, candidates, constexprs
from fp6_compile.kernels.triton.mm import mm_kernel
from fp6_compile.kernels.triton.run import three

FORMATS = ("e2m3", "e3m2")


@dataclass(frozen=True)
class Kernel:
    """One tile for x [m, k] and a weight [n, k] in `format`, float16."""

    tile: Config
    m: int
    n: int
    k: int
    format: str


def kernels(device: Device) -> list[Kernel]:
    """What the launcher takes for the problems of the stage `times`, and every candidate of the tuner's two weights."""
    found: dict[tuple[object, ...], Kernel] = {}
    for format in FORMATS:
        for shape in QUICK:
            for m in FIRST_BATCHES:
                tiles = candidates(m, shape.n, shape.k, None, torch.float16, device)
                tuned = format == FORMATS[0] and shape.n == shape.k
                for tile in filter(None, tiles if tuned else tiles[:1]):
                    # Sizes only matter to Triton by whether they are 1 or divisible by 16.
                    same = tile, format, m == 1, m % 16 == 0, shape.k % 256 == 0
                    found.setdefault(same, Kernel(tile, m, shape.n, shape.k, format))
    return list(found.values())


def compile_one(kernel: Kernel, sm: int) -> float:
    """Compile one kernel for sm_{sm}; seconds."""
    start, fmt, tile, f16 = time.monotonic(), get_format(kernel.format), kernel.tile, torch.float16
    parts, locks = (torch.float32, torch.int32) if tile.SPLIT_K > 1 else (f16, f16)
    constants = constexprs(tile, fmt, None, kernel.k, True)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    m, n, k = kernel.m, kernel.n, kernel.k
    planes = three([torch.int16] * len(fmt.planes))
    with fake_target(sm):
        mm_kernel.warmup(
            *(f16, *planes, torch.float32, f16, parts, locks, m, n, k, k), **constants, **options, grid=(1,)
        )
    return time.monotonic() - start


def warm(todo: Sequence[Kernel], sm: int, workers: int) -> list[float]:
    """Compile all of them; seconds of each."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, todo, [sm] * len(todo)))


def main() -> int:
    """Always 0: what is not compiled here is compiled later."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="two kernels for sm_90")
    arguments = parser.parse_args()
    device, workers, limit = Device("sm_90", 132), 1, 2
    if not arguments.dry_run:
        about = torch.cuda.get_device_properties(0)
        arch = f"sm_{about.major}{about.minor}"
        device = Device(arch, about.multi_processor_count, wgmma=arch == "sm_90")
        workers, limit = os.cpu_count() or 1, sys.maxsize
    start, todo = time.monotonic(), kernels(device)[:limit]
    seconds = warm(todo, int(device.arch.removeprefix("sm_")), workers)
    print(f"{len(todo)} kernels in {time.monotonic() - start:.1f} s, {sum(seconds):.0f} s of {workers} processes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
