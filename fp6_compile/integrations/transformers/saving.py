"""A packed model -> what `save_pretrained` writes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile.checkpoint.metadata import metadata, quantization_config
from fp6_compile.checkpoint.packed_weight import PackedWeight
from fp6_compile.integrations.transformers.names import ignored_on_save, stored_names, tied_names
from fp6_compile.packed.tensor import PackedTensor
from fp6_compile.storage.safetensors import sha256


class Flattened:
    """The tensors of a packed model as a folder has them: packed weights as bit planes and scale, tied ones once.

    original_names: the names of the checkpoints that transformers reads, where the model's modules are called otherwise.
    """

    def __init__(self, model: Any, original_names: bool) -> None:
        self.model, self.parts, self.weights = model, dict[str, Tensor](), dict[str, PackedWeight]()
        self.tied = _tied(model)
        for name, tensor in model.state_dict().items():
            if name not in ignored_on_save(model):
                self._add(name, tensor)
        self.tensors = stored_names(model, self.parts) if original_names else dict(self.parts)
        self._stored = {id(tensor): name for name, tensor in self.tensors.items()}
        for alias in self.tied:
            self.tensors.pop(self.stored(alias), None)

    def _add(self, name: str, tensor: Tensor) -> None:
        if tensor.is_meta:
            raise ValueError(f"fp6: {name} is offloaded; save the model from where all of it fits (device_map='cpu')")
        if name in self.tied:
            self.parts[name] = torch.empty(0)  # for its name alone
        elif isinstance(tensor, PackedTensor):
            self.weights[name] = weight = PackedWeight.of(tensor)
            self.parts |= zip(weight.tensors(name), weight.stored(tensor), strict=True)
        else:
            self.parts[name] = tensor

    def stored(self, name: str) -> str:
        """The name in the folder of a parameter or buffer; its own if it is merged with others or split."""
        suffix = "_scale" if name in self.weights else ""
        stored = self._stored.get(id(self.parts.get(f"{name}{suffix}")), f"{name}{suffix}")
        return stored.removesuffix(suffix)

    @property
    def metadata(self) -> dict[str, str]:
        """Of every shard."""
        weights = {self.stored(name): weight for name, weight in self.weights.items()}
        tied = {self.stored(alias): self.stored(name) for alias, name in self.tied.items()}
        return metadata(weights, tied, {name: sha256(tensor) for name, tensor in self.tensors.items()})

    @property
    def quantization_config(self) -> dict[str, Any]:
        """Of config.json."""
        about = quantization_config(self.model)
        about["modules_to_not_convert"] = [self._module(name) for name in about["modules_to_not_convert"]]
        about["module_formats"] = {self._module(name): how for name, how in about["module_formats"].items()}
        return about

    def _module(self, name: str) -> str:
        return self.stored(f"{name}.weight").removesuffix(".weight")


def _tied(model: nn.Module) -> dict[str, str]:
    """alias: the name under which the tensor is stored, the one that transformers keeps."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    aliases = tied_names(model)
    tied: dict[str, str] = {}
    for same in names.values():
        kept = min(same, key=lambda name: name in aliases)
        tied |= {name: kept for name in same if name != kept}
    return tied


def without_renaming(save_pretrained: Any, args: Any, kwargs: Any) -> tuple[bool, inspect.BoundArguments]:
    """Arguments with which save_pretrained leaves names as they are, and whether it was asked to rename them.

    Files say of each tensor by name what it is, so that names must be final before there are files.
    """
    bound = inspect.signature(save_pretrained).bind(*args, **kwargs)
    asked = bound.arguments.get("save_original_format", True)
    bound.arguments["save_original_format"] = False
    return asked, bound


def sort_metadata(folder: Path) -> None:
    """Equal models have equal files: the safetensors library writes a file's metadata in an order of chance."""
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            if "fp6" not in header.get("__metadata__", {}):
                continue
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
            if len(text) == length:
                file.seek(8)
                file.write(text)
