"""What quantization may add to an nn.Linear: low-rank factors of its error (LoRC), and a bias.

A linear with factors is a `LowRankLinear`; the factors are parameters like any others, in 16 bits, and are saved, moved and
compiled as such. A checkpoint's folder says by its names which linears have what, so that `load` makes them grow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FACTORS = ("low_rank_a", "low_rank_b")


class LowRankLinear(nn.Linear):
    """x W^T + bias + (x A) B, with A = `low_rank_a` [K, r] and B = `low_rank_b` [r, N]. Made by `grow`, never directly.

    Keep r below the backend's `min_features` (128): at and above it, backend="fp6" takes the factors for weights to pack.
    """

    low_rank_a: nn.Parameter
    low_rank_b: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """input [*, K] to [*, N]."""
        return super().forward(input) + (input @ self.low_rank_a) @ self.low_rank_b


def grow(linear: nn.Module, attribute: str, value: Tensor) -> None:
    """Give the linear a bias or a factor that does not require grad; with a factor it becomes a LowRankLinear, in place."""
    if attribute in FACTORS:
        linear.__class__ = LowRankLinear
    if not isinstance(value, nn.Parameter):
        value = nn.Parameter(value.detach(), requires_grad=False)
    setattr(linear, attribute, value)


def growth(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[nn.Module, str]]:
    """Which of the names in `shapes` plain linears of the model could grow: (linear, attribute) by name.

    Factors only in pairs, of shapes [K, r] and [r, N], and a bias [N] only where there is none.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for prefix, linear in model.named_modules(remove_duplicate=False):
        if not isinstance(linear, nn.Linear):
            continue
        bias, *factors = (f"{prefix}.{attribute}" if prefix else attribute for attribute in ("bias", *FACTORS))
        if linear.bias is None and shapes.get(bias) == (linear.out_features,):
            found[bias] = linear, "bias"
        a, b = (shapes.get(name, ()) for name in factors)
        fits = len(a) == len(b) == 2 and (a[0], a[1], b[1]) == (linear.in_features, b[0], linear.out_features)
        if fits and type(linear).forward is nn.Linear.forward:
            found |= {name: (linear, attribute) for name, attribute in zip(factors, FACTORS, strict=True)}
    return found


def has_plain_forward(module: nn.Module) -> bool:
    """Whether the module is a linear whose weight does nothing but multiply its input."""
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, LowRankLinear.forward)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter that has no values yet."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
