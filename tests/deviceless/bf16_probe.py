"""What Triton's interpreter makes of bf16, before and after interpreter_fixes; run by a test as a process of its own."""

import json

import torch
import triton
import triton.language as tl

from . import interpreter_fixes


@triton.jit
def dot(A, B, C):
    i = tl.arange(0, 16)
    tile = i[:, None] * 16 + i[None, :]
    tl.store(C + tile, tl.dot(tl.load(A + tile), tl.load(B + tile)))


@triton.jit
def add(A, B, C):
    i = tl.arange(0, 256)
    tl.store(C + i, (tl.load(A + i) + tl.load(B + i)).to(tl.float32))


@triton.jit
def cast(A, B, C):
    i = tl.arange(0, 256)
    tl.store(C + i, (tl.load(A + i).to(tl.float32) * 1.01).to(tl.bfloat16).to(tl.float32))


def right(a: torch.Tensor, b: torch.Tensor) -> dict[str, bool]:
    """Which of the three give the right numbers."""
    expected = {dot: a.double() @ b.double(), add: (a + b).double(), cast: (a.float() * 1.01).bfloat16().double()}
    results = {}
    for kernel, value in expected.items():
        c = torch.empty(16, 16)
        kernel[(1,)](a, b, c)
        results[kernel.__name__] = torch.allclose(c.double(), value, rtol=1e-6, atol=1e-5)
    return results


if __name__ == "__main__":
    torch.manual_seed(0)
    inputs = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    before = right(*inputs)
    interpreter_fixes.apply()
    print(json.dumps([before, right(*inputs)]))
