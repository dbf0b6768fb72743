"""Weights [N, K] of language models, by name; q, k and v, and gate and up, as one weight each, for they share an input."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A linear layer's weight, and the file its sizes are from."""

    name: str
    n: int
    k: int
    source: str


_LLAMA_8B = "config.json of meta-llama/Meta-Llama-3-8B: hidden 4096, intermediate 14336, 32 heads, 8 key-value heads"
_LLAMA_70B = "config.json of meta-llama/Meta-Llama-3-70B: hidden 8192, intermediate 28672, 64 heads, 8 key-value heads"
_QWEN_7B = "config.json of Qwen/Qwen2.5-7B: hidden 3584, intermediate 18944, 28 heads, 4 key-value heads"

# The first four are the quick ones: the peers' square, and large, medium and small.
SHAPES = [
    Shape("square-8192", 8192, 8192, "the shape of published W6A16 tables; also Llama-3-70B's o_proj"),
    Shape("llama3-8b.gate_up", 28672, 4096, _LLAMA_8B),
    Shape("llama3-8b.o", 4096, 4096, _LLAMA_8B),
    Shape("llama3-8b.k", 1024, 4096, _LLAMA_8B),
    Shape("llama3-8b.qkv", 6144, 4096, _LLAMA_8B),
    Shape("llama3-8b.down", 4096, 14336, _LLAMA_8B),
    Shape("llama3-70b.qkv", 10240, 8192, _LLAMA_70B),
    Shape("llama3-70b.gate_up", 57344, 8192, _LLAMA_70B),
    Shape("llama3-70b.down", 8192, 28672, _LLAMA_70B),
    Shape("qwen2.5-7b.qkv", 4608, 3584, _QWEN_7B),
    Shape("qwen2.5-7b.o", 3584, 3584, _QWEN_7B),
    Shape("qwen2.5-7b.gate_up", 37888, 3584, _QWEN_7B),
    Shape("qwen2.5-7b.down", 3584, 18944, _QWEN_7B),
]
QUICK = SHAPES[:4]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
QUICK_BATCHES = [1, 8, 16, 32, 64, 128, 256, 1024]
# In the order of what one would like to know first.
FIRST_BATCHES = [1, 64, 256, 16, 1024]


def get_shape(name: str) -> Shape:
    """The shape called `name`, or one given as NxK ("14336x4096"). Raises ValueError, which lists the known names."""
    known = {shape.name: shape for shape in SHAPES}
    if name in known:
        return known[name]
    n, x, k = name.partition("x")
    if not (x and n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise ValueError(f"shape: got {name!r}, needs NxK, such as 4096x14336, or one of {', '.join(known)}")
    return Shape(name, int(n), int(k), "given by hand")
