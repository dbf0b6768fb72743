"""Checkpoints -> packed weights: the folder as a whole, and one tensor at a time as operations of transformers' loader.

A packed folder is checked before the first tensor is loaded: transformers itself gives random values to what it does not
find, and only warns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile.checkpoint.manifest import Manifest
from fp6_compile.checkpoint.packed_weight import CheckpointError, PackedWeight
from fp6_compile.integrations.transformers.config import Fp6Config
from fp6_compile.integrations.transformers.names import ConversionOps, SourceConverter, get_module_from_name
from fp6_compile.packed import low_rank
from fp6_compile.packed.tensor import PackedTensor

# How the tensors of a packed weight end: bit planes of all widths, scale.
_SUFFIXES = ("w8", "w4", "w2", "w1", "scale")


def read_folder(files: Sequence[str] | None, config: Fp6Config) -> Manifest:
    """What `files` of one folder hold; CheckpointError if it is damaged, or if config.json says otherwise."""
    if not files:
        raise CheckpointError("fp6: a packed model is loaded from its folder; state_dict= alone does not describe it")
    folder = Path(files[0]).parent
    with torch.device("cpu"):  # transformers makes the model with torch.device("meta")
        manifest = Manifest.read(folder)
    read = {entry.file.path.name for entry in manifest.entries.values()}
    if missing := sorted({Path(file).name for file in files} - read):
        raise CheckpointError(f"fp6: {folder}: {missing[0]} is not among the files of the packed model, {sorted(read)}")
    _check_agrees(manifest.weights, config, folder)
    return manifest


def _check_agrees(weights: Mapping[str, PackedWeight], config: Fp6Config, folder: Path) -> None:
    modules = {name.removesuffix(".weight"): weight.spec for name, weight in weights.items()}
    for module, spec in modules.items():
        said = config.quant_config(module)
        says = (
            "is not packed" if module in (config.modules_to_not_convert or ()) else f"{said.format}, {said.group_size}"
        )
        if says != f"{spec.format}, {spec.group_size}":
            raise CheckpointError(
                f"fp6: {folder}: config.json says of {module} (format, group_size): {says}; "
                f"the shard that has it: {spec.format}, {spec.group_size}. Take both from the same save"
            )
    if unknown := sorted(config.module_formats.keys() - modules.keys()):
        raise CheckpointError(f"fp6: {folder}: config.json gives {unknown[0]} a format; no shard has it packed")


def grow(model: nn.Module, manifest: Manifest) -> None:
    """Give the linears of an empty model the biases and low-rank factors that the folder has for them."""
    shapes = {name: entry.shape for name, entry in manifest.plain.items()}
    for name, (linear, attribute) in low_rank.growth(model, shapes).items():
        low_rank.grow(linear, attribute, low_rank.empty(shapes[name], linear.get_parameter("weight").dtype))


class Quantize(ConversionOps):
    """A weight of 16 or 32 bits -> a packed one."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """`input_dict` by full parameter name; one of the model's own converters may have made several tensors of one."""
        return {name: self._quantized(name, _single(value), model) for name, value in input_dict.items()}

    def _quantized(self, name: str, value: Tensor, model: Any) -> Tensor:
        if not self.hf_quantizer.param_needs_quantization(model, name):
            return value
        dtype = get_module_from_name(model, name)[0].weight.dtype
        how = self.hf_quantizer.quantization_config.quant_config(name.removesuffix(".weight"))
        try:
            packed = PackedTensor.quantize(value, how.format, how.group_size, how.scale_method, dtype)
        except ValueError as error:  # NaN and infinite values, which nothing can pack
            self.hf_quantizer.refused[name] = str(error)
            return value.to(dtype)
        return nn.Parameter(packed, requires_grad=False)


class Unpack(ConversionOps):
    """Bit planes and scale of a packed folder -> the packed weight, or with `dequantize` the 16-bit one."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer
        self.sources: list[str] = []

    def __deepcopy__(self, memo: Any) -> Unpack:
        """The loader copies the operation for every weight; not what all have in common."""
        return Unpack(self.hf_quantizer)

    def convert(
        self, input_dict: dict[str, Any], *patterns: Any, full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`input_dict` by pattern ("weight_w4"); `sources` are the names in the files."""
        name = self.sources[0].rpartition("_")[0]
        weight = get_module_from_name(model, full_layer_name)[0].weight
        whole, dtype = self.hf_quantizer.stored[name], weight.dtype
        stored = _local(name, whole, weight)
        parts = {f"{name}_{pattern.rpartition('_')[2]}": _single(value) for pattern, value in input_dict.items()}
        if stored.spec.k < whole.spec.k and stored.spec.group_size is None:  # one column, which all ranks need
            parts[f"{name}_scale"] = self.hf_quantizer.entries[f"{name}_scale"].read()
        for part, about in stored.tensors(name).items():
            if (parts[part].dtype, tuple(parts[part].shape)) != about:
                raise ValueError(f"fp6: {part} came as {parts[part].dtype} {list(parts[part].shape)}, expected {about}")
        *planes, scale = (parts[part] for part in stored.tensors(name))
        packed: Any = replace(stored, spec=stored.spec._replace(dtype=dtype)).packed(planes, scale)
        if self.hf_quantizer.quantization_config.dequantize:
            return {full_layer_name: packed.dequantize()}
        return {full_layer_name: nn.Parameter(packed, requires_grad=False)}


def _local(name: str, stored: PackedWeight, parameter: Tensor) -> PackedWeight:
    """What this rank has of a weight: all of it, but under a `tp_plan` a part of its outputs or of its inputs.

    Raises ValueError for inputs that are not cut in whole groups and whole bytes of bit planes.
    """
    n, k = getattr(parameter, "_local_tensor", parameter).shape
    whole, group_size = stored.spec.k, stored.spec.group_size
    if k < whole and (k % 8 or (group_size or 1) > k or k % (group_size or 1)):
        groups = f" and of group_size {group_size}" if group_size else ""
        raise ValueError(f"fp6: {name}: {whole} inputs are cut into {k}, needs a multiple of 8{groups}")
    return replace(stored, rows=n, spec=stored.spec._replace(k=k))


def unpacking(hf_quantizer: Any) -> SourceConverter:
    """What makes the loader collect the tensors of each packed weight and give them to `Unpack`."""
    return SourceConverter([f"weight_{suffix}" for suffix in _SUFFIXES], "weight", operations=[Unpack(hf_quantizer)])


def _single(value: Any) -> Tensor:
    """The loader gives tensors alone or in lists of one."""
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
