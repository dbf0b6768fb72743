"""The matrix product: out [M, N] = x [M, K] @ weight [N, K].T, the weight a few bits wide until it is in registers.

One body, `accumulate`, for the eager kernel below and for the Inductor template that imports it. How it works:

- The weight is the MMA's *left* operand (the product computed is the transpose, acc [N, M]): a left operand of mma.sync is
  read from registers, where the weights are unpacked, so they never pass through shared memory as 16-bit values.
- A K block is 256 inputs in 8 chunks of 32. Chunk j's weights are the j-th output of `unpack`, and its activations are a
  contiguous piece of x: nothing is permuted. Eight dots a block.
- Products are summed in float32. A scale per row multiplies the finished sum; a scale per group multiplies the partial sum
  of the chunks that share it; no scale ever multiplies a weight.
- JOIN chunks become one dot. With wgmma (config.py says when) a dot's result is always finished, and scaled, before the next
  block is unpacked: its left operand's registers are then free.
- SPLIT_K programs share a tile, each with a stretch of K, where tiles alone would not fill the GPU. Who adds up their sums:
  the kernel that follows (lowerings/mm.py), or the program that comes last (`reduce`), always in the same order.
- N past the end reads the last tile of rows again (its results are not stored); K past the end meets code 0 in the weight,
  and zeros in x, for 0 times whatever lies there may be NaN.

float32 activations use the FP16 weights, which float32 holds exactly, and IEEE float32 dots.
"""

# mypy: allow-untyped-defs, disable-error-code="annotation-unchecked,assignment"
# The arguments of a @triton.jit function are Triton's.
# The file is long because ruff gives each of them a line of its own.
# No `from __future__ import annotations` here: a kernel's annotations are read when it is launched.

import math

import triton
import triton.language as tl

from fp6_compile.kernels.triton.unpack import exponent_rescale, plane_words, unpack
from fp6_compile.layouts.gpu_tiles import BLOCK_K, CHUNK, ROWS

_ROWS = tl.constexpr(ROWS)
_CHUNK = tl.constexpr(CHUNK)
_BLOCK_K = tl.constexpr(BLOCK_K)
_CHUNKS = tl.constexpr(BLOCK_K // CHUNK)
_WORDS = tl.constexpr(ROWS * CHUNK)  # of a block, for each of the words of a weight


@triton.constexpr_function
def _chunks_per_scale(group_size):
    """Chunks of a block whose products share a scale: a group that straddles blocks is summed in pieces."""
    return math.gcd(group_size, _BLOCK_K.value) // _CHUNK.value


@triton.jit
def _joined(w, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr = 1):
    """Chunks FIRST, FIRST + STEP, ... of `w`, an axis for each bit of the chunk's number, highest first: [n, k, ...]."""
    if COUNT == 1:
        return w[FIRST]
    else:  # noqa: RET505 (Triton needs it)
        even = _joined(w, FIRST, COUNT // 2, 2 * STEP)
        odd = _joined(w, FIRST + STEP, COUNT // 2, 2 * STEP)
        return tl.join(even, odd)


@triton.jit
def _side_by_side(w, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT chunks [n, 32] of the tuple `w`, from FIRST on, as one tile [n, 32 * COUNT]."""
    joined = _joined(w, FIRST, COUNT)
    if COUNT == 2:
        joined = tl.permute(joined, (0, 2, 1))
    elif COUNT == 4:
        joined = tl.permute(joined, (0, 2, 3, 1))
    elif COUNT == 8:
        joined = tl.permute(joined, (0, 2, 3, 4, 1))
    return tl.reshape(joined, [joined.shape[0], COUNT * _CHUNK])


@triton.jit
def accumulate(
    X,
    W0,
    W1,
    W2,
    SCALE,
    M,
    N,
    K,
    stride_xm,
    pid_n,
    pid_m,
    pid_k,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    JOIN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Tile (pid_n, pid_m) of the product's transpose, over the pid_k-th part of K, scaled: float32 [BLOCK_N, BLOCK_M].

    X: [M, K] float16, bfloat16 or float32, rows stride_xm apart, unit stride along K.
    W0, W1, W2: the planes, in the GPU tile layout of X's dtype (gpu_tiles.py); None for those that the format lacks.
    SCALE: [G, N] float32.
    SPLIT_K: parts of K. JOIN: chunks in a dot; more than one only where a dot must be finished before the next unpack.
    GROUP_SIZE: inputs per scale, a multiple of 32, or 0 for one scale a row. EVEN_K: K is a multiple of 256.
    The rest of the constants come from config.constexprs.
    """
    BF16: tl.constexpr = X.dtype.element_ty == tl.bfloat16
    # A sum over the chunks that share a scale; without groups, the accumulator itself is that sum, unless dots are joined.
    PARTIAL: tl.constexpr = GROUP_SIZE > 0 or JOIN > 1
    PER_SCALE: tl.constexpr = _chunks_per_scale(GROUP_SIZE)
    DOT: tl.constexpr = JOIN if JOIN < PER_SCALE else PER_SCALE
    C0: tl.constexpr = plane_words(EXPONENT_BITS, MANTISSA_BITS, 0)
    C1: tl.constexpr = plane_words(EXPONENT_BITS, MANTISSA_BITS, 1)
    C2: tl.constexpr = plane_words(EXPONENT_BITS, MANTISSA_BITS, 2)
    blocks = tl.cdiv(K, _BLOCK_K)
    share = tl.cdiv(blocks, SPLIT_K)
    begin = pid_k * share
    end = tl.minimum(begin + share, blocks)
    # Where a tile begins may lie past 2^31 words; inside it, 32-bit offsets are enough and take half the registers.
    rows = tl.arange(0, BLOCK_N)
    rows_left = tl.minimum(rows, N - 1 - pid_n * BLOCK_N)
    word = (rows % _ROWS)[:, None] * _CHUNK + tl.arange(0, _CHUNK)[None, :]
    block = (rows_left // _ROWS)[:, None] * blocks * _WORDS
    first = (tl.cast(pid_n, tl.int64) * (BLOCK_N // _ROWS) * blocks + begin) * _WORDS
    w0 = W0 + C0 * first + (C0 * block + word)
    w1, w2 = w0, w0
    if W1 is not None:
        w1 = W1 + C1 * first + (C1 * block + word)
    if W2 is not None:
        w2 = W2 + C2 * first + (C2 * block + word)
    k = tl.arange(0, DOT * _CHUNK)[:, None]
    column = tl.arange(0, BLOCK_M)[None, :]
    x = X + tl.cast(pid_m, tl.int64) * BLOCK_M * stride_xm + begin * _BLOCK_K + (column * stride_xm + k)
    # The mask compares these with M: offsets within the tile, compared with what is left of M, take 68 more registers.
    column += pid_m * BLOCK_M
    scale = SCALE + pid_n * BLOCK_N + rows_left
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    factor = tl.load(scale)[:, None]
    for kb in range(begin, end):
        # Here and not in a function: inlined, its constants come in another order, and ptxas allocates other registers.
        words = ()
        for i in tl.static_range(C0):
            words += (tl.load(w0 + i * _WORDS, eviction_policy="evict_first").to(tl.int16),)
        for i in tl.static_range(C1):
            words += (tl.load(w1 + i * _WORDS, eviction_policy="evict_first").to(tl.int16),)
        for i in tl.static_range(C2):
            words += (tl.load(w2 + i * _WORDS, eviction_policy="evict_first").to(tl.int16),)
        w = unpack(words, EXPONENT_BITS, MANTISSA_BITS, BF16, USE_ASM)
        for g in tl.static_range(_CHUNKS // PER_SCALE):
            if GROUP_SIZE > 0:
                group = (kb * _BLOCK_K + g * PER_SCALE * _CHUNK) // GROUP_SIZE
                if not EVEN_K:
                    group = tl.minimum(group, (K - 1) // GROUP_SIZE)
                factor = tl.load(scale + group * N)[:, None]
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) if PARTIAL else acc
            for j in tl.static_range(g * PER_SCALE, (g + 1) * PER_SCALE, DOT):
                inside = column < M
                if not EVEN_K:
                    inside = inside & (kb * _BLOCK_K + j * _CHUNK + k < K)
                tile = tl.load(x + j * _CHUNK, mask=inside, other=0.0)
                part = tl.dot(_side_by_side(w, j, DOT).to(tile.dtype), tile, part, input_precision="ieee")
            acc = acc + part * factor if PARTIAL else part
        w0 += C0 * _WORDS
        if W1 is not None:
            w1 += C1 * _WORDS
        if W2 is not None:
            w2 += C2 * _WORDS
        x += _BLOCK_K
    if not BF16:
        acc *= exponent_rescale(EXPONENT_BITS, MANTISSA_BITS, False)
    return acc if PARTIAL else acc * factor


@triton.jit
def reduce(acc, PARTS, LOCKS, M, N, pid_n, pid_m, pid_k, SPLIT_K: tl.constexpr):
    """The sum of the SPLIT_K tiles `acc` of one place, and whether this program is the last one, which alone has the sum.

    PARTS: float32 [SPLIT_K, M, N], scratch. LOCKS: int32, one per tile, all zero before and after a launch.
    The parts are added in the order of pid_k, whoever comes last: the same bits every time.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    inside = (n < N) & (m < M)
    place = PARTS + tl.cast(m, tl.int64) * N + n
    tl.store(place + pid_k * M * N, acc, mask=inside)
    lock = LOCKS + pid_n * tl.cdiv(M, BLOCK_M) + pid_m
    # The barrier: one thread's release speaks for the stores of all threads of this program.
    tl.debug_barrier()
    last = tl.atomic_add(lock, 1, sem="acq_rel") == SPLIT_K - 1
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for part in range(SPLIT_K):
        # .cg: past the first-level cache, which is not coherent.
        total += tl.load(place + part * M * N, mask=inside & last, other=0.0, cache_modifier=".cg")
    tl.store(lock, 0, mask=last)
    return total, last


@triton.jit
def mm_kernel(
    X,
    W0,
    W1,
    W2,
    SCALE,
    OUT,
    PARTS,
    LOCKS,
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    JOIN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """OUT [M, N], contiguous, of X's dtype. The programs that read the same weights are neighbours.

    PARTS and LOCKS: see `reduce`; not read when SPLIT_K is 1.
    """
    pid_k = tl.program_id(0) % SPLIT_K
    pid = tl.program_id(0) // SPLIT_K
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_n = pid // tiles_m
    pid_m = pid % tiles_m
    acc = accumulate(
        X,
        W0,
        W1,
        W2,
        SCALE,
        M,
        N,
        K,
        stride_xm,
        pid_n,
        pid_m,
        pid_k,
        BLOCK_N=BLOCK_N,
        BLOCK_M=BLOCK_M,
        SPLIT_K=SPLIT_K,
        JOIN=JOIN,
        GROUP_SIZE=GROUP_SIZE,
        EVEN_K=EVEN_K,
        EXPONENT_BITS=EXPONENT_BITS,
        MANTISSA_BITS=MANTISSA_BITS,
        USE_ASM=USE_ASM,
    )
    n = tl.arange(0, BLOCK_N)[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    inside = (n < N - pid_n * BLOCK_N) & (m < M - pid_m * BLOCK_M)
    if SPLIT_K > 1:
        acc, last = reduce(acc, PARTS, LOCKS, M, N, pid_n, pid_m, pid_k, SPLIT_K)
        inside = inside & last
    out = OUT + tl.cast(pid_m, tl.int64) * BLOCK_M * N + pid_n * BLOCK_N
    tl.store(out + (m * N + n), acc.to(OUT.dtype.element_ty), mask=inside)
