"""Greedy decoding with a static cache: the step that is compiled, and the loop around it.

A step is one graph: embedding, all layers, head, and the choice of the next token. Token and position never leave the
device; only the clock waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from examples.code_lm.model import CodeLM, KVCache

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_step(model: CodeLM, cache: KVCache) -> Step:
    """(token [B, 1], position [1]) to the next token, the likeliest one, and the next position."""

    def step(token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(token, cache, position)
        return logits[:, -1].argmax(-1, keepdim=True), position + 1

    return step


@torch.inference_mode()
def decode(step: Step, batch: int, tokens: int, device: str) -> tuple[list[float], list[int]]:
    """Seconds of each of `tokens` steps from an empty cache, and the first sequence's tokens."""
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    seconds, chosen = [], []
    for _ in range(tokens):
        start = time.perf_counter()
        token, position = step(token, position)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        chosen.append(int(token[0]))
    return seconds, chosen
