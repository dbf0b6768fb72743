"""The shipped weights: one safetensors file in FP16, with its configuration and provenance in the header.

How it works. safetensors metadata is a flat dictionary of strings, so the configuration is one JSON string in it and
the provenance (Python and torch versions, steps, date, held-out bits per byte) another. Nothing is executed on load.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .model import CodeLM, ModelConfig

WEIGHTS = Path(__file__).with_name("weights.safetensors")


def export_weights(model: CodeLM, provenance: dict[str, Any], path: Path = WEIGHTS) -> None:
    """Write `model` in FP16 to `path`, atomically; `provenance` must survive JSON."""
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    metadata = {"config": json.dumps(asdict(model.config)), "provenance": json.dumps(provenance)}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def read_metadata(path: Path = WEIGHTS) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and provenance of an exported file, without reading its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a safetensors file that `export_weights` did not write.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "config" not in metadata or "provenance" not in metadata:
        raise ValueError(f"{path.name} has no config and provenance; it was not written by examples.code_lm.train")
    return ModelConfig(**json.loads(metadata["config"])), json.loads(metadata["provenance"])


def load_pretrained(
    path: Path = WEIGHTS, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CodeLM:
    """The trained model in eval mode, on `device`, in `dtype` (FP16, BF16 or FP32).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a safetensors file that `export_weights` did not write.
    """
    config, _ = read_metadata(path)
    with torch.device("meta"):
        model = CodeLM(config)
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is not iterable)
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
