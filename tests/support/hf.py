"""Small random transformers models, in folders."""

from __future__ import annotations

import os

import pytest
import torch

from fp6_compile import PackedTensor

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

SIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {**SIDE, "num_key_value_heads": 2, "vocab_size": 256, "head_dim": 64}
TOKENS = torch.arange(1, 17)[None]


def llama(dtype=torch.bfloat16, **fields):
    """A model with seven linears and a head."""
    config = transformers.LlamaConfig(**SIZES, **fields)
    return transformers.LlamaForCausalLM(config).to(dtype)


def packed(model):
    """The names of the packed parameters."""
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, PackedTensor)}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits
