"""Small models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

DIM = 256


class SwiGLU(nn.Module):
    """x + down(silu(gate(x)) * up(x)), the gate with a bias: all that a store can be fused with."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Grouped-query attention with q, k and v from one input; it returns k and v, as for a cache."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, n, bias=bias) for n in (256, 128, 128))
        self.o = nn.Linear(256, DIM, bias=False)

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, 64).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1)), k, v


class Heads(nn.Module):
    """Several linears of one input, and nothing else."""

    def __init__(self, *sizes: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(DIM, n, bias=bias) for n in sizes])

    def forward(self, x):
        return [head(x) for head in self.heads]


class Tower(nn.Module):
    """Linears of every kind: plain, tied to another, tied to an embedding, too small, one with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(160, 256), nn.Linear(256, 160, bias=False)
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 256)
        self.gate, self.odd = nn.Linear(256, 4), Odd(256, 256)
        self.norm = nn.LayerNorm(256)
        self.experts = nn.Parameter(torch.randn(2, 256, 256) / 16)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("frequencies", torch.randn(8), persistent=False)
        self.head.weight = self.embed.weight
        self.second.weight = self.first.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.second(torch.relu(self.first(x))))
        return self.head(x + self.odd(x) + x @ self.experts[0]) + self.gate(x).sum() * self.frequencies.sum()


class Odd(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2
