"""The call that decodes one token with a transformers model, for the command line."""

from __future__ import annotations

from typing import Any

import torch


def one_token(model: Any, context: int) -> dict[str, Any]:
    """Arguments of a call with a static KV cache for `context` tokens; none, and no cache, where the model takes none.

    Encoder-decoders get one token on each side.
    """
    import transformers

    config: Any = model.config
    token = torch.zeros(1, 1, dtype=torch.long)
    if config.is_encoder_decoder:
        return {"input_ids": token, "decoder_input_ids": token, "use_cache": False}
    if not getattr(config, "use_cache", False):
        return {"input_ids": token}
    text = config.get_text_config(decoder=True)
    cache: Any = transformers.StaticCache(config=config, max_cache_len=context)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    cache.early_initialization(1, getattr(text, "num_key_value_heads", None) or heads, size, model.dtype, "cpu")
    return {"input_ids": token, "position_ids": token + context // 2, "past_key_values": cache}
