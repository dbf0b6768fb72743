"""A byte-level Llama in one file: the real model that the examples compress.

How it works. A token is a byte, so the vocabulary has 256 entries and there is no tokenizer. Each block is
RMSNorm, grouped-query attention with rotary positions, RMSNorm, SwiGLU. Four query heads share two key and value
heads, so q, k and v are matrices of different sizes, as they are in a real Llama. All weights that matter are plain
`nn.Linear` without bias, which is what a compiler backend looks for.

The same `forward` trains and decodes. Without a cache it is causal attention over the whole sequence. With a
`KVCache` it writes the new keys and values at `input_pos` and attends over the whole fixed-length cache under a mask
that is computed from the positions. Shapes never depend on the position, so one compiled graph serves every step.

What it leaves out: dropout, tied embeddings, a maximum length (positions are computed, not looked up), paged or
ragged caches (all sequences of a batch are at the same position).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder; the defaults are the shipped model.

    Raises:
        ValueError: when the heads do not divide evenly.
    """

    vocab: int = 256
    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 512
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(f"dim must be heads times an even number, got dim {self.dim} and {self.heads} heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads


class KVCache(NamedTuple):
    """Keys and values of all past positions, one pair of tensors [batch, kv_heads, length, head_dim] per layer.

    One tensor per layer rather than one for all: `index_copy_` then writes into a graph input itself, not into a view
    of one, and a compiler needs no copy to keep the meaning.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """An empty cache for `length` positions of `batch` sequences; `dtype` is that of the model's weights."""
        shape = (batch, config.kv_heads, length, config.head_dim)
        tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * config.layers)]
        for tensor in tensors:
            # CUDA graphs refuse inputs that are written to, unless they are known to stay where they are.
            torch._dynamo.mark_static_address(tensor, guard=False)
        return cls(tuple(tensors[: config.layers]), tuple(tensors[config.layers :]))

    @property
    def length(self) -> int:
        """Positions the cache has room for."""
        return self.keys[0].shape[2]


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in FP32 whatever the input's type."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to the same shape and dtype."""
        # The square of an FP16 activation above 255 would already be infinite.
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight.float()).to(x.dtype)


def rope_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, head_dim / 2] in FP32 for positions [T].

    Computed in the graph instead of kept as a buffer: `model.half()` would round a buffer, and the compiler
    folds these few elements into their consumers.
    """
    channel = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float()[:, None] * torch.pow(base, -channel / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of the last dimension of [B, heads, T, head_dim] against each other, in FP32."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and an optional cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        kv_dim = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, n * head_dim] to [B, n, T, head_dim]."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[B, T, dim] to [B, T, dim]; with `past`, writes the new keys and values at `positions` first."""
        q = rotate(self._heads(self.q_proj(x)), rope)
        k = rotate(self._heads(self.k_proj(x)), rope)
        v = self._heads(self.v_proj(x))
        if past is not None:
            k = past[0].index_copy_(2, positions, k)
            v = past[1].index_copy_(2, positions, v)
        y = self._attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        shared = self.config.heads // self.config.kv_heads
        if mask is None:
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # Heads that share keys become queries of one head: the cache is neither copied nor read more than once.
        queries = q.reshape(-1, 1, shared * q.shape[2], q.shape[3])
        k, v = k.flatten(0, 1).unsqueeze(1), v.flatten(0, 1).unsqueeze(1)
        y = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask.repeat(shared, 1))
        return y.view_as(q)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] to [B, T, dim]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[B, T, dim] to [B, T, dim]."""
        x = x + self.attention(self.attention_norm(x), positions, rope, mask, past)
        return x + self.feed_forward(self.feed_forward_norm(x))


class CodeLM(nn.Module):
    """The decoder. Fresh weights are random; `checkpoint.load_pretrained` gives the trained ones."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab, bias=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Keep activations near one; what writes to the residual stream starts small, so that depth is harmless."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, Block):  # apply() visits children first, so this has the last word
            for linear in (module.attention.o_proj, module.feed_forward.down_proj):
                nn.init.zeros_(linear.weight)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, input_pos: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab] in FP32 of the byte after each of `tokens` [B, T] (int64).

        Args:
            cache: written at `input_pos` and attended over; without it, attention is causal over `tokens` alone.
            input_pos: int64 [T], the positions of `tokens`, each less than `cache.length`. Needed with a cache.

        Raises:
            ValueError: a cache without positions, or positions without a cache.
        """
        if (cache is None) != (input_pos is None):
            raise ValueError("cache and input_pos go together: give both or neither")
        if cache is None or input_pos is None:
            positions, mask = torch.arange(tokens.shape[1], device=tokens.device), None
        else:
            positions = input_pos
            mask = torch.arange(cache.length, device=tokens.device) <= input_pos[:, None]
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_base)
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            past = (cache.keys[i], cache.values[i]) if cache is not None else None
            x = layer(x, positions, rope, mask, past)
        return self.lm_head(self.norm(x)).float()

    def parameter_count(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for p in self.parameters())
