"""A Llama for decoding, by size: the layers of examples/code_lm with q, k, v in one linear, and gate and up in one.

Decoders are usually served with merged projections: four matmuls a layer instead of seven. So they are the same for every
backend that is compared here.

Query heads that share keys and values become rows of one attention matmul, so that the cache is read once and never
repeated in memory. The head is applied to the last token only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.code_lm.model import KVCache, ModelConfig, RMSNorm, rope_angles, rotate

SIZES = {
    "tiny": ModelConfig(),
    "1b": ModelConfig(vocab=32000, dim=2048, layers=22, heads=32, kv_heads=4, hidden=5632),  # TinyLlama-1.1B
    "8b": ModelConfig(
        vocab=128256, dim=4096, layers=32, heads=32, kv_heads=8, hidden=14336, rope_base=5e5
    ),  # Llama 3.1
    "70b": ModelConfig(vocab=128256, dim=8192, layers=80, heads=64, kv_heads=8, hidden=28672, rope_base=5e5),
}


class Attention(nn.Module):
    """Grouped-query attention over a static cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, config.dim + 2 * config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[B, T, dim] to [B, T, dim]; writes keys and values at `positions` of `past`, two of [B, kv_heads, length, hd]."""
        config = self.config
        heads = self.qkv(x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        q, k, v = heads.split([config.heads, config.kv_heads, config.kv_heads], dim=1)
        k = past[0].index_copy_(2, positions, rotate(k, rope))
        v = past[1].index_copy_(2, positions, v)
        rows = rotate(q, rope).reshape(-1, 1, mask.shape[0], config.head_dim)
        k, v = k.flatten(0, 1).unsqueeze(1), v.flatten(0, 1).unsqueeze(1)
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).view_as(q)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate) * up), gate and up from one linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] to [B, T, dim]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[B, T, dim] to [B, T, dim]."""
        x = x + self.attention(self.attention_norm(x), positions, rope, mask, past)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """The decoder, without meaningful weights: weights.py fills it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, vocab] in FP32 after the last of `tokens` [B, T] (int64), which stand at `positions` [T]."""
        config = self.config
        rope = rope_angles(positions, config.head_dim, config.rope_base)
        mask = torch.arange(cache.length, device=tokens.device) <= positions[:, None]
        mask = mask.repeat(config.heads // config.kv_heads, 1)
        x = self.embedding(tokens)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer(x, positions, rope, mask, (keys, values))
        logits: Tensor = self.head(self.norm(x[:, -1])).float()
        return logits


def parameter_count(config: ModelConfig) -> int:
    """Number of weights of a model of these sizes."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())
