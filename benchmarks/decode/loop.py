"""Prefill and decode with a static cache: the functions that are compiled, and the loop around them.

A step is one graph: embedding, all layers, head, and the choice of the next token, `steps` times over. Token, position and
all chosen tokens stay in tensors that the graph writes: between two steps nothing is copied to the host or from it, and a
CUDA graph of the step can simply be replayed.

Random numbers are drawn before the loop, one row for every position. What is chosen at a position then depends on the seed
and on the tokens before it, and not on the backend or on how many tokens share a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# (tokens [B, T], positions [T]) to logits [B, vocab] after the last token; writes a cache.
Forward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest where `temperature` is 0, else drawn from the `top_k` likeliest."""

    temperature: float = 0.0
    top_k: int = 50


class State:
    """The state of a loop, on the device: `token` [B, 1], `position` [1], `chosen` [B, length], and noise for sampling.

    `length` is one more than a cache needs: the token that is chosen last is read by no step.
    """

    def __init__(self, batch: int, length: int, sampling: Sampling, device: str) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.sampling = sampling
        self.token, self.position, self.chosen = zeros(batch, 1), zeros(1), zeros(batch, length)
        generator = torch.Generator(device).manual_seed(0)
        draws = (length, batch, sampling.top_k) if sampling.temperature else (0,)
        # An index drawn from softmax(x) is the argmax of x + Gumbel noise, which is -log of exponential noise.
        self.gumbel = torch.empty(draws, device=device).exponential_(generator=generator).log_().neg_()
        for tensor in (self.token, self.position, self.chosen, self.gumbel):
            # CUDA graphs refuse inputs that are written to, unless they are known to stay where they are.
            torch._dynamo.mark_static_address(tensor, guard=False)

    def choose(self, logits: Tensor, position: Tensor) -> Tensor:
        """Token ids [B, 1] to stand at `position`, from logits [B, vocab]."""
        how = self.sampling
        if not how.temperature:
            return logits.argmax(-1, keepdim=True)
        values, indices = logits.topk(min(how.top_k, logits.shape[-1]))
        noise = self.gumbel.index_select(0, position)[0, :, : values.shape[1]]
        return indices.gather(1, (values / how.temperature + noise).argmax(-1, keepdim=True))

    def put(self, token: Tensor, position: Tensor) -> None:
        """`token` [B, 1] was chosen for `position` [1]."""
        self.chosen.index_copy_(1, position, token)


def make_prefill(forward: Forward, state: State) -> Callable[[Tensor], None]:
    """A function of a prompt [B, T] that fills the cache and chooses the token after it."""

    def prefill(prompt: Tensor) -> None:
        positions = torch.arange(prompt.shape[1], device=prompt.device)
        end = positions[-1:] + 1
        token = state.choose(forward(prompt, positions), end)
        state.put(token, end)
        state.token.copy_(token)
        state.position.copy_(end)

    return prefill


def make_step(forward: Forward, state: State, steps: int = 1) -> Callable[[], None]:
    """A function that reads `state.token` at `state.position`, and chooses the `steps` tokens that follow."""

    def step() -> None:
        token, position = state.token, state.position
        for _ in range(steps):
            following = position + 1
            token, position = state.choose(forward(token, position), following), following
            state.put(token, position)
        state.token.copy_(token)
        state.position.copy_(position)

    return step


@torch.inference_mode()
def run(prefill: Callable[[], None], step: Callable[[], None], calls: int, device: str) -> tuple[float, list[float]]:
    """Seconds of a prefill, and of each of `calls` steps after it.

    On a GPU by events on its stream: the host runs ahead, as it does in a loop that does not read every token.
    """
    mark = _Marks(device)
    mark()
    prefill()
    mark()
    for _ in range(calls):
        step()
        mark()
    first, *rest = mark.seconds()
    return first, rest


class _Marks:
    """Points in time, and the seconds between them."""

    def __init__(self, device: str) -> None:
        self.cuda, self.marks = device == "cuda", list[Any]()

    def __call__(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]
