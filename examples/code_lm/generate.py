"""Continue a piece of Python, one byte at a time, with the static cache.

    python -m examples.code_lm.generate --prompt "def fibonacci(n):\n" --temperature 0.7

How it works. The prompt goes through the model in one call, which fills the cache; from then on every call has one
byte and a position, the same shapes each time. `step` is the model or a compiled version of it, and is called for
those single bytes only, so that it is compiled for one shape.

What it leaves out: top-k and beams, batches, a window that slides when the cache is full.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .checkpoint import load_pretrained
from .data import SEPARATOR
from .model import CodeLM, KVCache


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One byte [B, 1] from the last position of `logits` [B, T, vocab]; the likeliest one at temperature 0."""
    last = logits[:, -1]
    if temperature == 0:
        return last.argmax(-1, keepdim=True)
    return torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)


@torch.inference_mode()
def stream(
    model: CodeLM,
    prompt: bytes,
    count: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    step: Callable[[Tensor, KVCache, Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """Yield `count` bytes that continue `prompt`, which is taken to be the start of a file.

    Args:
        temperature: 0 is greedy, 1 the model's own distribution.
        seed: of the sampling; unused when greedy.
        step: called instead of `model` for single bytes, for instance `torch.compile(model)`.

    Raises:
        ValueError: a temperature below zero.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    step = model if step is None else step
    weight = model.lm_head.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    tokens = torch.tensor([list(SEPARATOR + prompt)], device=weight.device)
    position = torch.arange(tokens.shape[1], device=weight.device)
    cache = KVCache.allocate(model.config, 1, tokens.shape[1] + count, dtype=weight.dtype, device=weight.device)
    logits = model(tokens, cache, position)
    position = position[-1:]
    for _ in range(count):
        token = sample(logits, temperature, generator)
        yield int(token)
        # Counted on the device: a position that came from the host would be one more copy per byte.
        position = position + 1
        logits = step(token, cache, position)


def main() -> None:
    """Command line: print the prompt and its continuation as they come."""
    parser = argparse.ArgumentParser(description="Continue Python source with the shipped byte-level model.")
    parser.add_argument("--prompt", default="def fibonacci(n):\\n", help="start of a file; \\n is a new line")
    parser.add_argument("--count", type=int, default=400, help="bytes to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    args = parser.parse_args()
    prompt = args.prompt.replace("\\n", "\n")
    print(prompt, end="")
    # Latin-1 shows any byte; the model saw too few above 127 to be trusted with UTF-8.
    for byte in stream(load_pretrained(), prompt.encode(), args.count, temperature=args.temperature, seed=args.seed):
        print(bytes([byte]).decode("latin-1"), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
