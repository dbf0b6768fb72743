"""Tiny models with a tokenizer, made without a network, and their folders: 16 bits, packed, dequantized."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast, Qwen3Config

from fp6_compile import QuantConfig, quantize_

VOCABULARY = 512
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
# A large config is made of these by `make`, too: its shape goes over this one.
CONFIGS: Mapping[str, Any] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "mixtral": lambda **shape: MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2),
}


def make(kind: str, folder: Path, **shape: Any) -> None:
    """Save a BF16 model of random weights, large enough that its logits differ, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**_SHAPE, **shape}), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of this file's own text, with a chat template."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token="<s>", eos_token="</s>")
    found.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return found


def pack(
    source: Path,
    packed: Path,
    dequantized: Path | None = None,
    skip: Sequence[str] = ("lm_head",),
    module_formats: Mapping[str, str] | None = None,
    **how: Any,
) -> None:
    """Write `packed`, and `dequantized` with the weights that it stands for, from the 16-bit folder `source`.

    `how`: of quantize_. `module_formats`: the format of linears whose names match a glob, first of all.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    for glob, format in (module_formats or {}).items():
        matching = functools.partial(_matches, glob)
        quantize_(model, QuantConfig(**{**how, "format": format}, skip=skip, filter_fn=matching))
    quantize_(model, QuantConfig(**how, skip=skip))
    model.save_pretrained(packed)
    tokenizer().save_pretrained(packed)
    if dequantized is None:
        return
    model.dequantize(torch.float32)  # so that float32 engines can be compared
    model.save_pretrained(dequantized)
    tokenizer().save_pretrained(dequantized)


def _matches(glob: str, module: torch.nn.Module, name: str) -> bool:
    return fnmatchcase(name, glob)
