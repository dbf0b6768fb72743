"""A model of transformers from a local folder, with weights of a kind, and its own static cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decode.loop import Forward
from benchmarks.decode.model.weights import integers
from fp6_compile import init_empty_weights, quantize_


def load(
    path: str,
    kind: str,
    *,
    head: str | None,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
    **packing: Any,
) -> nn.Module:
    """The causal language model in folder `path`, its linears of `kind`; `head` is None or "float".

    In six bits it is packed one tensor at a time, from the folder's safetensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = ["lm_head"] if head == "float" else []
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if kind == "fp6":
        config = AutoConfig.from_pretrained(path, **how)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        quantize_(model, source=path, device=device, skip=kept, **packing)
    else:
        floats: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **how)
        model = floats.to(device)
        if kind in ("int8", "int4"):
            lm_head = model.lm_head
            model.lm_head = nn.Identity() if kept else lm_head
            model = integers(model, kind)
            model.lm_head = lm_head if kept else model.lm_head
    model.requires_grad_(False).eval()
    return model


def static_cache(
    model: Any, batch: int, length: int, dtype: torch.dtype, device: str
) -> tuple[Forward, Any, list[Tensor]]:
    """(forward, rewind, tensors) of `model` with a transformers StaticCache for `length` positions.

    The cache counts its positions itself: `rewind()` sets them to none.
    """
    from transformers import StaticCache

    config = model.config.get_text_config()
    cache = StaticCache(config=model.config, max_cache_len=length)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache.early_initialization(batch, kv_heads, head_dim, dtype, torch.device(device))

    def forward(tokens: Tensor, positions: Tensor) -> Tensor:
        out = model(tokens, past_key_values=cache, position_ids=positions[None], use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1].float()
        return logits

    layers: list[Any] = cache.layers
    return forward, cache.reset, [tensor for layer in layers for tensor in (layer.keys, layer.values)]
