"""The weight as floats [N, K], for ATen's matmul: worth writing where x has many rows.

The same numbers as `fp6::dequantize`: the code's value times the scale in float32, rounded once.
"""

# mypy: allow-untyped-defs, disable-error-code="annotation-unchecked,assignment"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp6_compile.formats import Format
from fp6_compile.kernels.triton.config import format_constants
from fp6_compile.kernels.triton.run import device_of, three, uses_asm
from fp6_compile.kernels.triton.unpack import exponent_rescale, plane_words, unpack
from fp6_compile.layouts.gpu_tiles import BLOCK_K, CHUNK, ROWS

_ROWS = tl.constexpr(ROWS)
_CHUNK = tl.constexpr(CHUNK)
_BLOCK_K = tl.constexpr(BLOCK_K)
_CHUNKS = tl.constexpr(BLOCK_K // CHUNK)
_WORDS = tl.constexpr(ROWS * CHUNK)


@triton.jit
def dequantize_kernel(
    W0,
    W1,
    W2,
    SCALE,
    OUT,
    N,
    K,
    stride_sg,
    GROUP_SIZE: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BF16: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """16 rows by 256 inputs a program. OUT: [N, K], contiguous; SCALE: groups stride_sg apart; the rest as in mm.py."""
    blocks = tl.cdiv(K, _BLOCK_K)
    pid_n = tl.program_id(0) // blocks
    kb = tl.program_id(0) % blocks
    row = tl.arange(0, _ROWS)[:, None]
    word = row * _CHUNK + tl.arange(0, _CHUNK)[None, :]
    first = tl.cast(tl.program_id(0), tl.int64) * _WORDS
    C0: tl.constexpr = plane_words(EXPONENT_BITS, MANTISSA_BITS, 0)
    C1: tl.constexpr = plane_words(EXPONENT_BITS, MANTISSA_BITS, 1)
    C2: tl.constexpr = plane_words(EXPONENT_BITS, MANTISSA_BITS, 2)
    words = ()
    for i in tl.static_range(C0):
        words += (tl.load(W0 + C0 * first + (word + i * _WORDS)).to(tl.int16),)
    for i in tl.static_range(C1):
        words += (tl.load(W1 + C1 * first + (word + i * _WORDS)).to(tl.int16),)
    for i in tl.static_range(C2):
        words += (tl.load(W2 + C2 * first + (word + i * _WORDS)).to(tl.int16),)
    w = unpack(words, EXPONENT_BITS, MANTISSA_BITS, BF16, USE_ASM)
    n = pid_n * _ROWS + row
    for j in tl.static_range(_CHUNKS):
        k = kb * _BLOCK_K + j * _CHUNK + tl.arange(0, _CHUNK)[None, :]
        group = k // GROUP_SIZE if GROUP_SIZE > 0 else k * 0
        inside = (n < N) & (k < K)
        scale = tl.load(SCALE + group * stride_sg + n, mask=inside, other=0.0)
        value = (
            w[j].to(tl.float32) if BF16 else w[j].to(tl.float32) * exponent_rescale(EXPONENT_BITS, MANTISSA_BITS, False)
        )
        tl.store(OUT + tl.cast(n, tl.int64) * K + k, (value * scale).to(OUT.dtype.element_ty), mask=inside)


def dequantize(
    planes: Sequence[Tensor], scale: Tensor, fmt: Format, group_size: int | None, k: int, dtype: torch.dtype
) -> Tensor:
    """The rows [N, k] in `dtype`, N = scale.shape[1]; planes in the GPU layout of `dtype`, scale [G, N] of unit stride."""
    n = scale.shape[1]
    out = torch.empty(n, k, dtype=dtype, device=scale.device)
    grid = (planes[0].shape[0] * planes[0].shape[1],)
    constants = {"GROUP_SIZE": group_size or 0, "BF16": dtype == torch.bfloat16, **format_constants(fmt)}
    with device_of(scale):
        asm = uses_asm(scale.device.type)
        dequantize_kernel[grid](*three(planes), scale, out, n, k, scale.stride(0), **constants, USE_ASM=asm)
    return out
