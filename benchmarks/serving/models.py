"""Tiny models with a tokenizer, made without a network, and their folders: 16 bits, packed, dequantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast, Qwen3Config

from fp6_compile import PackedTensor
from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import PLANES, plane_names

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
    format: str = "e2m3",
    group_size: int | None = None,
    head: bool = False,
    module_formats: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write `packed`, and `dequantized` with the weights that it stands for, from the 16-bit folder `source`."""
    for folder in (packed, dequantized):
        if folder is not None:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    kept, tensors, plain = [], {}, {}
    for file in source.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            module = name.removesuffix(".weight")
            if not (module.endswith("_proj") or (head and module == "lm_head")):
                tensors[name] = plain[name] = weight
                kept += [module] if weight.dim() == 2 and "embed" not in name else []
                continue
            how = {"format": format, "group_size": group_size, **(module_formats or {}).get(module, {})}
            weight = PackedTensor.quantize(weight, **how)
            *planes, scale = weight.repack(PLANES).tensors
            for plane, tensor in zip(plane_names(get_format(how["format"])), planes, strict=True):
                tensors[f"{name}_{plane}"] = tensor
            tensors[f"{name}_scale"] = scale.T.contiguous()
            plain[name] = weight.dequantize(
                torch.float32
            )  # not rounded to BF16, so that float32 engines can be compared
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    if dequantized is not None:
        save_file(plain, dequantized / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp6",
        "version": 2,
        "format": format,
        "group_size": group_size,
        "modules_to_not_convert": kept,
        "module_formats": module_formats or {},
    }
    (packed / "config.json").write_text(json.dumps(config))
