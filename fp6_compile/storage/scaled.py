"""Checkpoints of 8-bit weights with scales: FP8 or int8, dequantized with them as they are read. Others are errors.

    X.weight             F8_E4M3, F8_E5M2 or I8  [N, K]
    X.weight_scale       what each weight is multiplied by: one scale for all, one a row, or one a block; DeepSeek and
    X.weight_scale_inv   transformers' "fp8" call it so, and multiply all the same
    config.json          quantization_config: who wrote it, and the size of the blocks

Read are quant_method "fp8" (weight_block_size; without it one scale for all or one a row), "fbgemm_fp8" (rows) and
"compressed-tensors" (symmetric, 8 bits), and folders that say nothing of it, with one scale for all or one a row. Scales of
activations are not used: activations stay in 16 bits. Whatever else a config.json names is an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp6_compile.storage.files import member, read_json, reason, short
from fp6_compile.storage.safetensors import Entry, folder_entries

# Where a config.json speaks of it.
QUANTIZATION = ("quantization_config", "compression_config")
# Inputs and outputs that share a scale; None is all of them.
Block = tuple[int | None, int | None]
_TENSOR: Block = (None, None)
_ROW: Block = (1, None)
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
_SCALES = ("F32", "F16", "BF16", "F8_E8M0")
_COMPRESSED = ("float-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scaled:
    """A weight of eight bits that is read with its scales, of which each is for a block [rows, columns]."""

    weight: Entry
    scale: Entry
    block: tuple[int, int]

    @property
    def name(self) -> str:
        """The weight's."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.weight.shape

    @property
    def dtype(self) -> str:
        """That of the values."""
        return "F32"

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a parameter of `dtype` can have its values."""
        return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The products with the scales, float32."""
        value, scale = self.weight.read(device).float(), self.scale.read(device).float()
        if scale.numel() == 1:
            return value.mul_(scale.view(()))
        rows = scale.view(scale.shape[0], -1).repeat_interleave(self.block[0], 0)[: value.shape[0]]
        for columns, factor in zip(value.split(self.block[1], 1), rows.split(1, 1), strict=True):
            columns.mul_(factor)
        return value


def stored(folder: str | os.PathLike[str], names: Iterable[str]) -> dict[str, Entry | Scaled]:
    """What the safetensors files of a folder have of the model's tensors `names`, 8-bit weights with their scales.

    Raises:
        FileNotFoundError: no safetensors files.
        ValueError: a damaged file; a quant_method that is not read; a scale of a wrong shape or dtype, or that is negative,
            NaN or infinite; a weight with scales of another kind, or with zero points.
    """
    entries, names = folder_entries(folder), set(names)
    blocks = _blocks(quantization(Path(folder)))
    found: dict[str, Entry | Scaled] = {name: entries[name] for name in names & entries.keys()}
    for name, suffixes in _companions(entries, names).items():
        weight = entries[name]
        if weight.dtype not in _EIGHT_BITS or suffixes not in (["_scale"], ["_scale_inv"]):
            raise ValueError(
                f"fp6: {short(name)} is {weight.dtype} with {', '.join(map(short, suffixes))} in source; "
                f"read are {', '.join(_EIGHT_BITS)} with a _scale or _scale_inv"
            )
        scale = entries[name + suffixes[0]]
        found[name] = Scaled(weight, scale, _block(weight, scale, blocks))
        _check(scale)
    return found


def quantization(folder: Path) -> dict[str, Any] | None:
    """What the folder's config.json says of quantization; None if it says nothing, or is not there."""
    try:
        config = read_json(member(folder, "config.json"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"fp6: cannot read {folder / 'config.json'}: {reason(error)}") from error
    found = [config.get(key) for key in QUANTIZATION] if isinstance(config, dict) else []
    said = next((value for value in found if value is not None), None)
    if said is not None and not isinstance(said, dict):
        raise ValueError(f"fp6: {folder / 'config.json'}: quantization_config is no table")
    return said


def _blocks(config: Mapping[str, Any] | None) -> list[Block]:
    """The blocks that scales may be for."""
    if config is None:
        return [_TENSOR, _ROW]
    method = config.get("quant_method")
    if method == "fbgemm_fp8":
        return [_ROW]
    if method == "fp8":
        size = config.get("weight_block_size")
        return [_TENSOR, _ROW] if size is None else [_sizes(size)]
    if method == "compressed-tensors":
        try:
            return _compressed(config)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"fp6: source: not a quantization_config of compressed-tensors: {error!r}") from error
    readers = {"quark": ": fp6_compile.load_quark_mxfp6 reads it", "fp6": ": fp6_compile.load reads it"}
    hint = readers.get(str(method), "; save the model in 16 bits first")
    raise ValueError(
        f"fp6: source is quantized by quant_method {short(method)!r}; "
        f"read are 'fp8', 'fbgemm_fp8' and 'compressed-tensors'{hint}"
    )


def _compressed(config: Mapping[str, Any]) -> list[Block]:
    """Of compressed-tensors: the blocks of all its groups. ValueError for what is more than 8-bit codes times scales."""
    groups = list(config["config_groups"].values())
    formats = {about.get("format") or config.get("format") for about in groups}
    if other := [format for format in formats if str(format) not in _COMPRESSED]:
        raise ValueError(f"fp6: source: compressed-tensors in format {short(other[0])!r}; read are {list(_COMPRESSED)}")
    sparse = (config.get("sparsity_config") or {}).get("format") or "dense"
    if sparse != "dense" or config.get("transform_config"):
        raise ValueError("fp6: source: sparse and transformed weights of compressed-tensors are not read")
    found: list[Block] = []
    for weights in (about.get("weights") for about in groups):
        if weights is None:  # a group for activations
            continue
        if weights["num_bits"] != 8 or not weights.get("symmetric", True):
            raise ValueError("fp6: source: of compressed-tensors, symmetric weights of 8 bits are read")
        strategy, structure = weights.get("strategy") or "tensor", weights.get("block_structure")
        if isinstance(structure, str):  # "128x128"
            structure = [int(size) if size.isdecimal() else size for size in structure.split("x")]
        if strategy == "tensor":
            found.append(_TENSOR)
        elif strategy == "channel":
            found.append(_ROW)
        elif strategy in ("group", "block"):
            found.append(_sizes([1, weights["group_size"]] if strategy == "group" else structure))
        else:
            raise ValueError(f"fp6: source: strategy {short(strategy)!r} of compressed-tensors is not read")
    return found


def _sizes(value: Any) -> Block:
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(
            f"fp6: source: a block of scales is {short(value)} in config.json, needs two positive integers"
        )
    return value[0], value[1]


def _companions(entries: Mapping[str, Entry], names: set[str]) -> dict[str, list[str]]:
    """What else there is of the model's weights: by name, what follows it in the names of tensors that are not the model's.

    Of weights in 16 bits only scales and zero points: they would be ignored without a word.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(entries.keys() - names):
        for end in (i for i, character in enumerate(name) if character == "_"):
            base, suffix = name[:end], name[end:]
            matters = "scale" in suffix or "zero_point" in suffix
            if base in names and base in entries and (matters or entries[base].dtype in _EIGHT_BITS):
                found.setdefault(base, []).append(suffix)
    return found


def _block(weight: Entry, scale: Entry, blocks: Iterable[Block]) -> tuple[int, int]:
    """The block of each scale; ValueError unless exactly one of `blocks` is one that the shapes fit."""
    shape = scale.shape if len(scale.shape) > 1 else (*scale.shape, 1, 1)[:2]
    if len(weight.shape) == 2:
        n, k = weight.shape
    else:
        n, k, blocks = 1, torch.Size(weight.shape).numel(), [block for block in blocks if block == _TENSOR]
    sizes = {(min(rows or n, n), min(columns or k, k)) for rows, columns in blocks}
    fitting = [(rows, columns) for rows, columns in sizes if shape == (_parts(n, rows), _parts(k, columns))]
    if len(fitting) != 1 or scale.dtype not in _SCALES:
        raise ValueError(
            f"fp6: {short(scale.name)} is {list(scale.shape)} of {scale.dtype} in source, "
            f"for {list(weight.shape)} in blocks of {' or '.join(str(list(size)) for size in sorted(sizes))}"
        )
    return fitting[0]


def _parts(whole: int, part: int) -> int:
    return -(-whole // max(part, 1))


def _check(scale: Entry) -> None:
    values = scale.read().float()
    if not (values.isfinite().all() and (values >= 0).all()):
        raise ValueError(f"fp6: {short(scale.name)} has values that are NaN, infinite or negative")
