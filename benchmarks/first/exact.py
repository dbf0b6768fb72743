"""What must be right to the last bit, by every kind of tile: `python -m benchmarks.first.exact --out FILE`.

codes     every code at each of the 256 places of a block, as its value: x is the identity matrix, eight rows at a time and
          all at once. Subnormal FP16 weights that tensor cores flush, or a bit table that is wrong, show here.
integers  x in -1, 0, 1 and scales of 1, twenty times: float32 holds every sum exactly in any order. Races show here.

A row is written as soon as it is known; the exit code is 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp6_compile.formats import Format, get_format
from fp6_compile.kernels.selection.choices import describe
from fp6_compile.kernels.selection.launch import aten_mm
from fp6_compile.kernels.triton.config import Config
from fp6_compile.kernels.triton.run import run
from fp6_compile.layouts.packing import gpu_layout, pack

Mm = Callable[..., Tensor]
FORMATS, DTYPES = ("e3m2", "e2m3"), (torch.float16, torch.bfloat16)


def families(arch: str) -> dict[str, Mm]:
    """One function (x, planes, scale, format, group size) for each kind of tile."""
    tiles = {
        "mma.sync, 8 columns": Config(64, 8, 2, 3),
        "mma.sync, 64 columns": Config(64, 64, 2, 3),
        "mma.sync, K split in 4": Config(32, 8, 2, 2, SPLIT_K=4),
    }
    if arch == "sm_90":
        tiles["wgmma"] = Config(128, 128, 8, 2, JOIN=4)
    found: dict[str, Mm] = {name: functools.partial(run, tile) for name, tile in tiles.items()}
    return {**found, "dequantize, then ATen's": aten_mm}


def codes_are_exact(mm: Mm, fmt: Format, dtype: torch.dtype, device: str, rows: int) -> bool:
    """See the module; `rows` of x at a time."""
    count = 2**fmt.bits
    codes = (torch.arange(count)[:, None] + torch.arange(256)).remainder(count).to(torch.uint8)
    planes = [plane.to(device) for plane in pack(codes, fmt, gpu_layout(dtype))]
    x, scale = torch.eye(256, dtype=dtype, device=device), torch.ones(1, count, device=device)
    out = torch.cat([mm(some, planes, scale, fmt, None) for some in x.split(rows)])
    return torch.equal(out.cpu(), fmt.decode(codes).T.to(dtype))


def integers_are_exact(mm: Mm, fmt: Format, dtype: torch.dtype, device: str, sizes: tuple[int, int, int, int]) -> bool:
    """See the module; `sizes` are M, N, K and how often."""
    m, n, k, times = sizes
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**fmt.bits, (n, k), dtype=torch.uint8, generator=generator)
    x = torch.randint(-1, 2, (m, k), generator=generator).to(dtype)
    exact = (x.double() @ fmt.decode(codes).double().T).to(dtype)
    planes = [plane.to(device) for plane in pack(codes, fmt, gpu_layout(dtype))]
    x, scale = x.to(device), torch.ones(1, n, device=device)
    return all(torch.equal(mm(x, planes, scale, fmt, None).cpu(), exact) for _ in range(times))


def checks(dry: bool) -> Iterator[tuple[dict[str, Any], Callable[[], bool]]]:
    """What is checked, and the check."""
    device = "cpu" if dry else "cuda"
    m, n, k, times = (9, 64, 1024, 1) if dry else (130, 768, 4096, 20)
    for name, mm in families(describe(torch.device(device)).arch).items():
        for format in FORMATS:
            for dtype in DTYPES[:1] if dry else DTYPES:  # Triton's interpreter multiplies bfloat16 wrongly
                about = {"tile": name, "format": format, "dtype": str(dtype).removeprefix("torch.")}
                how = mm, get_format(format), dtype, device
                if "split" not in name:  # a block of 256 inputs is too short to be split
                    for rows in (256,) if dry else (8, 256):
                        yield {**about, "check": "codes", "m": rows}, functools.partial(codes_are_exact, *how, rows)
                yield (
                    {**about, "check": "integers", "m": m},
                    functools.partial(integers_are_exact, *how, (m, n, k, times)),
                )


def main() -> int:
    """Exit code 1 if anything was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="interpreted on the CPU: needs TRITON_INTERPRET=1")
    arguments = parser.parse_args()
    # ATen's library may else add parts of a sum in 16 bits.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    rows: list[dict[str, Any]] = []
    for about, check in checks(arguments.dry_run):
        try:
            outcome = "exact" if check() else "WRONG"
        except Exception as error:
            outcome = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        rows.append({**about, "outcome": outcome})
        print(*rows[-1].values(), sep="  ", flush=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    wrong = [row for row in rows if row["outcome"] != "exact"]
    print(f"{len(rows)} checks, {len(wrong)} not exact")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
