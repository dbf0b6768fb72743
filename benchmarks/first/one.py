"""Some launches of one kernel, for a profiler or a checker: `ncu python -m benchmarks.first.one --m 1`."""

from __future__ import annotations

import argparse
import sys

import torch

from fp6_compile.formats import DEFAULT, get_format
from fp6_compile.kernels.selection import launch
from fp6_compile.layouts.packing import gpu_layout, pack


def main() -> int:
    """Exit code 1 unless all launches give the same finite numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, default=1, help="rows of x")
    parser.add_argument("--size", type=int, default=8192, help="outputs and inputs of the weight")
    parser.add_argument("--dry-run", action="store_true", help="interpreted on the CPU: needs TRITON_INTERPRET=1")
    arguments = parser.parse_args()
    device, size = ("cpu", 512) if arguments.dry_run else ("cuda", arguments.size)
    fmt, dtype = get_format(DEFAULT), torch.float16
    codes = torch.randint(0, 2**fmt.bits, (size, size), dtype=torch.uint8)
    planes = [plane.to(device) for plane in pack(codes, fmt, gpu_layout(dtype))]
    x, scale = torch.randn(arguments.m, size).to(device, dtype), torch.full((1, size), 1e-3, device=device)
    out = [launch.mm(x, planes, scale, fmt, None) for _ in range(2 if arguments.dry_run else 5)]
    same = all(torch.equal(each, out[0]) for each in out) and bool(out[0].isfinite().all())
    print(f"{len(out)} launches, {'the same numbers' if same else 'DIFFERENT NUMBERS'}")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
