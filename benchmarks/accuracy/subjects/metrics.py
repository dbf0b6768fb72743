"""Measures of the difference that quantization makes, each a few lines of torch.

All compare a model to itself in sixteen bits. Where a measure is a mean over documents or sentences it is returned per
unit, so that its error can be estimated by resampling them (Efron's bootstrap).
"""

from __future__ import annotations

import ast
import re

import torch
from torch import Tensor


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) in bits, [...], from log-probabilities and logits, both [..., vocab]."""
    log_q = logits.log_softmax(-1)
    return (reference.exp() * (reference - log_q)).sum(-1) / torch.log(torch.tensor(2.0))


def common_prefix(a: Tensor, b: Tensor) -> Tensor:
    """The share of each row [B] of two token matrices [B, T] that comes before their first difference."""
    return (a == b).long().cumprod(-1).float().mean(-1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of the rows of two matrices [B, T] without ties, [B]."""
    ranks = [x.argsort(-1).argsort(-1).double() for x in (a, b)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    return (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))


def kendall(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's tau of the rows of two matrices [B, T] without ties, [B]: agreeing less disagreeing pairs, of all."""
    count = a.shape[-1]
    # Every element agrees with itself.
    agree = [((x[:, None] > x) == (y[:, None] > y)).sum() - count for x, y in zip(a, b, strict=True)]
    return torch.stack(agree).double() * 2 / (count * (count - 1)) - 1


def bootstrap(values: Tensor, weights: Tensor | None = None, *, draws: int = 1000, seed: int = 0) -> Tensor:
    """Means [draws, ...] of `values` [units, ...] over units drawn with replacement, weighted by `weights` [units].

    The same seed draws the same units, so that means of two rows may be subtracted or divided draw by draw.
    """
    units = len(values)
    weights = torch.ones(units) if weights is None else weights
    drawn = torch.randint(units, (draws, units), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, units).scatter_add_(1, drawn, torch.ones(draws, units)).double() * weights
    means = counts @ values.double().reshape(units, -1) / counts.sum(1, keepdim=True)
    return means.reshape(draws, *values.shape[1:])


def body(text: str, indent: int) -> str:
    """The complete statements that continue a `def` line indented by `indent`: up to the line that leaves the function.

    A text that stops inside the function loses its last statement, which is likely to be cut.
    """
    lines = text.split("\n")
    depths = [len(line) - len(line.lstrip()) if line.strip() else None for line in lines]
    end = next((i for i, depth in enumerate(depths) if depth is not None and depth <= indent), None)
    if end is None:
        inner = next((depth for depth in depths if depth is not None), 0)
        end = max((i for i, depth in enumerate(depths) if depth == inner), default=0)
    return "\n".join(lines[:end])


def parses(header: str, text: str) -> bool | None:
    """Whether Python parses the function that begins with the line `header` and goes on with `text`; it needs a body.

    None if the text stops inside of the body's first statement or a long string: then there is nothing to judge.
    """
    indent = len(header) - len(header.lstrip())
    inside = body(text, indent)
    ended = any(line.strip() and len(line) - len(line.lstrip()) <= indent for line in text.split("\n"))
    if not inside.strip():
        return False if ended else None
    source = f"{header}\n{inside}\n"
    try:
        ast.parse(f"if 1:\n{source}" if indent else source)
    except SyntaxError as error:
        return None if not ended and "unterminated triple-quoted" in error.msg else False
    except ValueError:  # a NUL
        return False
    return True


HEADER = re.compile(r"^[ \t]*def \w+\(.*\).*:$", re.MULTILINE)
