"""Whether wgmma computes right on this very device, asked once and remembered.

wgmma runs while the program goes on, and reads its left operand from registers. If a compiler lets the program reuse those
registers too early, sums are wrong now and then (Triton issue 9433 and pull request 11781, with ptxas 12.8 and 12.9). The
kernel waits for each dot before it unpacks the next weights (mm.py), the form in which none of these was seen. That is no
proof, and wrong sums in a language model still read fluently. So the kernel multiplies integers first, whose sums are
exact in any order; a single bit off, and tiles with mma.sync are used instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import triton

from fp6_compile._compat.triton import get_cache_manager, knobs
from fp6_compile.formats import Format
from fp6_compile.kernels.triton.config import Config, Device, config_for
from fp6_compile.kernels.triton.run import run
from fp6_compile.layouts.packing import gpu_layout, pack

_M, _N, _K = 256, 512, 4096
_REPETITIONS = 20
_FILE = "fp6_wgmma.json"

_log = logging.getLogger(__name__)


# What this process knows already.
_answers: dict[tuple[torch.device, torch.dtype, Format, int | None], bool] = {}


def passes(
    device: torch.device, dtype: torch.dtype, fmt: Format, group_size: int | None, *, may_launch: bool = True
) -> bool:
    """Whether the wgmma tile for these multiplies integers exactly on `device`. The answer is kept in Triton's cache.

    With may_launch=False, for a stream that is being recorded, nothing is launched: where no answer is known it is no.
    """
    problem = device, dtype, fmt, group_size
    if problem in _answers:
        return _answers[problem]
    remembered = get_cache_manager(_key(*problem))
    if path := remembered.get_file(_FILE):
        _answers[problem] = bool(json.loads(Path(path).read_text()))
    elif may_launch:
        _answers[problem] = _asked(*problem, remembered)
    return _answers.get(problem, False)


def _asked(device: torch.device, dtype: torch.dtype, fmt: Format, group_size: int | None, remembered: Any) -> bool:
    """The test's answer. A test that cannot run says no, in this process only: the next may have the memory it lacked."""
    name = torch.cuda.get_device_name(device)
    try:
        exact = _is_exact(device, dtype, fmt, group_size)
    except Exception as error:
        _log.warning("fp6: the self-test of wgmma could not run on %s, so wgmma is not used: %r", name, error)
        return False
    if not exact:
        _log.warning("fp6: wgmma gave wrong sums on %s: it is not used", name)
    remembered.put(json.dumps(exact), _FILE, binary=False)
    return exact


def _is_exact(device: torch.device, dtype: torch.dtype, fmt: Format, group_size: int | None) -> bool:
    """x in -1, 0, 1 and scales of 1, and no weight above 2^11 times the smallest: float32 holds the sums in any order.

    For each output `dtype` rounds the exact sum, and the computed one, in the same way.
    """
    config = config_for(_M, _N, _K, group_size, dtype, Device("sm_90", wgmma=True))
    assert isinstance(config, Config)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**fmt.bits, (_N, _K), dtype=torch.uint8, generator=generator)
    values = fmt.values()
    codes[(values.abs() > 2**11 * values[1])[codes.int()]] = 0
    x = torch.randint(-1, 2, (_M, _K), generator=generator).to(device, dtype)
    planes = [plane.to(device) for plane in pack(codes, fmt, gpu_layout(dtype))]
    scale = torch.ones(-(-_K // group_size) if group_size else 1, _N, device=device)
    exact = (x.double() @ fmt.decode(codes).to(device).double().T).to(dtype)
    runs = (run(config, x, planes, scale, fmt, group_size) for _ in range(_REPETITIONS))
    return all(torch.equal(product, exact) for product in runs)


def _key(device: torch.device, dtype: torch.dtype, fmt: Format, group_size: int | None) -> str:
    """Of device, driver side of torch, compilers and kernels: whatever changes, the test runs again."""
    kernels = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    assembler = knobs.nvidia.ptxas  # TRITON_PTXAS_PATH may name another
    versions = torch.__version__, triton.__version__, assembler.path, assembler.version
    about = (torch.cuda.get_device_name(device), versions, dtype, fmt, group_size)
    return hashlib.sha256(repr(about).encode() + kernels).hexdigest()
