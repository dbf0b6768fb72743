"""The toy kernel of the harness's own tests: an int8 weight widened to the type of x, weights as the dot's left operand.

`weight_times_x` is shared by the plain kernel below, compiled in machine code tests, and by the template of toy.py, which
imports it into the generated module as fp6_compile's templates import theirs.
"""

import triton
import triton.language as tl


@triton.jit
def weight_times_x(X, W, rows_n, rows_m, M, K, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile W[rows_n] @ X[rows_m].T in fp32."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        rows_k = k + tl.arange(0, BLOCK_K)
        w = tl.load(W + rows_n[:, None] * K + rows_k[None, :]).to(X.dtype.element_ty)
        x = tl.load(X + rows_m[None, :] * K + rows_k[:, None], mask=rows_m[None, :] < M, other=0.0)
        acc = tl.dot(w, x, acc)
    return acc


@triton.jit
def toy_mm(X, W, SCALE, Y, M, N, K, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Y = X @ W.T * SCALE."""
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = weight_times_x(X, W, rows_n, rows_m, M, K, BLOCK_N, BLOCK_M, BLOCK_K)
    acc = acc * tl.load(SCALE + rows_n)[:, None]
    tl.store(Y + rows_m[None, :] * N + rows_n[:, None], acc.to(Y.dtype.element_ty), mask=rows_m[None, :] < M)
