"""Milliseconds per token of a decode loop: Inductor with 16-bit weights, then backend="fp6" on the same model.

    python -m examples.decode_latency                  8 layers of a 1.1 B Llama, random weights
    python -m examples.decode_latency --layers 22      all of its layers

A decode step is one token through the model, with a static KV cache. It reads every weight once, and reading them takes most
of its time: six bits save time where weights come from memory and not from a cache.

`python -m benchmarks.decode` measures with more care: percentiles, batches, memory, other widths, each in its own process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from examples.code_lm.model import CodeLM, KVCache, ModelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, WARM_UP = 16, 4  # tokens; the first steps compile, and record a CUDA graph


def make(layers: int) -> CodeLM:
    """A model of TinyLlama-1.1B's width in BF16, with random weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = CodeLM(ModelConfig(vocab=32000, dim=2048, layers=layers, heads=32, kv_heads=4, hidden=5632))
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def decode(model: CodeLM, step: Callable[[Tensor, KVCache, Tensor], Tensor], count: int) -> list[float]:
    """Seconds of each of `count` greedy decode steps after a prompt, by `step`, the model or a compiled version of it."""
    like = model.lm_head.weight
    cache = KVCache.allocate(model.config, 1, PROMPT + WARM_UP + count, dtype=like.dtype, device=like.device)
    positions = torch.arange(PROMPT, device=like.device)
    token = model(positions[None], cache, positions)[:, -1:].argmax(-1)
    position, seconds = positions[-1:] + 1, []
    for _ in range(WARM_UP + count):
        start = time.perf_counter()
        token = step(token, cache, position)[:, -1:].argmax(-1)
        position = position + 1
        if like.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def main(argv: list[str] | None = None) -> None:
    """Compile by each backend, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    model = make(arguments.layers)
    print(f"{model.parameter_count() / 1e9:.2f} B parameters, {DEVICE}", flush=True)
    for backend in ("inductor", "fp6"):
        torch._dynamo.reset()
        mode = "reduce-overhead" if DEVICE == "cuda" else None
        step = torch.compile(model, backend=backend, mode=mode, fullgraph=True, dynamic=False)
        seconds = decode(model, step, arguments.tokens)
        print(f"{backend:<8} {1e3 * statistics.median(seconds):8.2f} ms per token", flush=True)


if __name__ == "__main__":
    main()
