"""The matrix product: out [M, N] = x [M, K] @ weight [N, K].T, the weight six bits wide until it is in registers.

One body, `accumulate`, for the eager kernel below and for the Inductor template that imports it. How it works:

- The weight is the MMA's *left* operand (the product computed is the transpose, acc [N, M]): a left operand of mma.sync is
  read from registers, where the weights are unpacked, so they never pass through shared memory as 16-bit values.
- A K block is 256 inputs in 8 slabs of 32. Slab j's weights are the j-th output of `unpack`, and its activations are a
  contiguous piece of x: nothing is permuted. Eight dots a block.
- Products are summed in float32. A scale per row multiplies the finished sum; a scale per group multiplies the partial sum
  of the slabs that share it; no scale ever multiplies a weight.
- N past the end reads the last tile of rows again (its results are not stored); K past the end meets code 0 in the weight,
  and zeros in x, for 0 times whatever lies there may be NaN.

float32 activations use the FP16 weights, which float32 holds exactly, and IEEE float32 dots.
"""

# mypy: allow-untyped-defs, disable-error-code="annotation-unchecked"
# The arguments of a @triton.jit function are Triton's.
# No `from __future__ import annotations` here: a kernel's annotations are read when it is launched.

import math

import torch
import triton
import triton.language as tl

from fp6_compile.formats import FORMATS
from fp6_compile.kernels.unpack import unpack
from fp6_compile.packing import BLOCK_K, ROWS, SLAB

_ROWS = tl.constexpr(ROWS)
_SLAB = tl.constexpr(SLAB)
_BLOCK_K = tl.constexpr(BLOCK_K)
_SLABS = tl.constexpr(BLOCK_K // SLAB)
_WORDS = tl.constexpr(ROWS * SLAB)  # of a block, in each of A0, A1 and B
_LIFT = tl.constexpr({f.exponent_bits: f.lift(torch.float16) for f in FORMATS.values()})


@triton.constexpr_function
def _lift(exponent_bits):
    return _LIFT.value[exponent_bits]


@triton.constexpr_function
def _slabs_per_scale(group_size):
    """Slabs of a block whose products share a scale: a group that straddles blocks is summed in pieces."""
    return math.gcd(group_size, _BLOCK_K.value) // _SLAB.value


@triton.jit
def accumulate(
    X,
    W4,
    W2,
    SCALE,
    M,
    N,
    K,
    stride_xm,
    pid_n,
    pid_m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The finished tile (pid_n, pid_m) of the product's transpose: float32 [BLOCK_N, BLOCK_M].

    X: [M, K] float16, bfloat16 or float32, rows stride_xm apart, unit stride along K.
    W4, W2: int16 words, the slab layout of X's dtype (packing.layout_for). SCALE: [G, N] float32.
    GROUP_SIZE: inputs per scale, a multiple of 32, or 0 for one scale a row. EVEN_K: K is a multiple of 256.
    The rest of the constants come from config.constexprs.
    """
    BF16: tl.constexpr = X.dtype.element_ty == tl.bfloat16
    PER_SCALE: tl.constexpr = _slabs_per_scale(GROUP_SIZE)
    blocks = tl.cdiv(K, _BLOCK_K)
    # Where a tile begins may lie past 2^31 words; inside it, 32-bit offsets are enough and take half the registers.
    rows = tl.arange(0, BLOCK_N)
    rows_left = tl.minimum(rows, N - 1 - pid_n * BLOCK_N)
    word = (rows % _ROWS)[:, None] * _SLAB + tl.arange(0, _SLAB)[None, :]
    block = (rows_left // _ROWS)[:, None] * blocks * _WORDS
    first = tl.cast(pid_n, tl.int64) * (BLOCK_N // _ROWS) * blocks * _WORDS
    w4 = W4 + 2 * first + (2 * block + word)
    w2 = W2 + first + (block + word)
    k = tl.arange(0, _SLAB)[:, None]
    column = tl.arange(0, BLOCK_M)[None, :]
    x = X + tl.cast(pid_m, tl.int64) * BLOCK_M * stride_xm + (column * stride_xm + k)
    # The mask compares these with M: offsets within the tile, compared with what is left of M, take 68 more registers.
    column += pid_m * BLOCK_M
    scale = SCALE + pid_n * BLOCK_N + rows_left
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for kb in range(blocks):
        a0 = tl.load(w4, eviction_policy="evict_first")
        a1 = tl.load(w4 + _WORDS, eviction_policy="evict_first")
        b = tl.load(w2, eviction_policy="evict_first")
        w = unpack(a0, a1, b, EXPONENT_BITS, BF16, USE_ASM)
        for g in tl.static_range(_SLABS // PER_SCALE):
            if GROUP_SIZE > 0:
                group = (kb * _BLOCK_K + g * PER_SCALE * _SLAB) // GROUP_SIZE
                if not EVEN_K:
                    group = tl.minimum(group, (K - 1) // GROUP_SIZE)
                factor = tl.load(scale + group * N)[:, None]
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) if GROUP_SIZE > 0 else acc
            for j in tl.static_range(g * PER_SCALE, (g + 1) * PER_SCALE):
                inside = column < M
                if not EVEN_K:
                    inside = inside & (kb * _BLOCK_K + j * _SLAB + k < K)
                tile = tl.load(x + j * _SLAB, mask=inside, other=0.0)
                part = tl.dot(w[j].to(tile.dtype), tile, part, input_precision="ieee")
            acc = acc + part * factor if GROUP_SIZE > 0 else part
        w4 += 2 * _WORDS
        w2 += _WORDS
        x += _BLOCK_K
    if not BF16:
        acc *= _lift(EXPONENT_BITS)
    if GROUP_SIZE == 0:
        acc *= tl.load(scale)[:, None]
    return acc


@triton.jit
def mm_kernel(
    X,
    W4,
    W2,
    SCALE,
    OUT,
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """OUT [M, N], contiguous, of X's dtype. One tile a program; the programs that read the same weights are neighbours."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_n = pid // tiles_m
    pid_m = pid % tiles_m
    acc = accumulate(
        X,
        W4,
        W2,
        SCALE,
        M,
        N,
        K,
        stride_xm,
        pid_n,
        pid_m,
        BLOCK_N=BLOCK_N,
        BLOCK_M=BLOCK_M,
        GROUP_SIZE=GROUP_SIZE,
        EVEN_K=EVEN_K,
        EXPONENT_BITS=EXPONENT_BITS,
        USE_ASM=USE_ASM,
    )
    n = tl.arange(0, BLOCK_N)[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    out = OUT + tl.cast(pid_m, tl.int64) * BLOCK_M * N + pid_n * BLOCK_N
    inside = (n < N - pid_n * BLOCK_N) & (m < M - pid_m * BLOCK_M)
    tl.store(out + (m * N + n), acc.to(OUT.dtype.element_ty), mask=inside)
