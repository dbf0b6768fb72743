"""The eager launcher of the kernel: the tile is chosen by M on every call, so that no shape is ever the wrong one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from fp6_compile.formats import Format
from fp6_compile.kernels.config import config_for, constexprs
from fp6_compile.kernels.mm import mm_kernel

# TRITON_INTERPRET is read by triton.jit, when the kernel is defined.
INTERPRETED = not isinstance(mm_kernel, triton.runtime.JITFunction)


def uses_asm(device_type: str) -> bool:
    """Whether the kernel for `device_type` ("cuda", "cpu", ...) unpacks by PTX: only on NVIDIA, never interpreted."""
    return device_type == "cuda" and torch.version.hip is None and not INTERPRETED


def mm(x: Tensor, w4: Tensor, w2: Tensor, scale: Tensor, fmt: Format, group_size: int | None) -> Tensor:
    """x @ weight.T.

    Args:
        x: [M, K], float16, bfloat16 or float32, any strides; on a GPU, or on the CPU when Triton's interpreter is on.
        w4, w2: the weight [N, K] in the slab layout that `packing.layout_for` gives for a GPU and x's dtype.
        scale: [G, N] float32; G is 1 when group_size is None.
        fmt: the format of the codes.
        group_size: inputs per scale; `config.supports(group_size)` must be None.

    Returns:
        [M, N], contiguous, of x's dtype: products summed in float32, scaled, rounded once.
    """
    (m, k), n = x.shape, scale.shape[1]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    config = config_for(m, n, k, group_size, x.dtype)
    constants = constexprs(config, fmt, group_size, k, uses_asm(x.device.type))
    options = {} if INTERPRETED else {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (triton.cdiv(n, config.BLOCK_N) * triton.cdiv(m, config.BLOCK_M),)
    with _device_of(x):
        mm_kernel[grid](x, w4, w2, scale, out, m, n, k, x.stride(0), **constants, **options)
    return out


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    return nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)
