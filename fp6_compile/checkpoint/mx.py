"""OCP MXFP6 checkpoints, as AMD Quark writes them, exactly: E3M2 or E2M3 codes, and an E8M0 scale for every 32 inputs.

    X.weight        uint8 [N, 3 K / 4]    four codes v0 to v3 in three bytes, little end first; bits from the high end:
                                          v1 v1 v0 v0 v0 v0 v0 v0   v2 v2 v2 v2 v1 v1 v1 v1   v3 v3 v3 v3 v3 v3 v2 v2
    X.weight_scale  uint8 [N, K / 32]     E8M0: 2^(s - 127), 255 is NaN
    config.json     quantization_config   quant_method "quark"; the weights' dtype ("fp6_e3m2" or "fp6_e2m3"), by layer or
                                          for all

The codes are ours bit for bit, and so are the values: an MX block is a group of 32 with a power of two for a scale, and
float32 holds them all, 2^-127 as a subnormal. Activations stay in 16 bits, whatever the checkpoint says of them.

Sources: OCP Microscaling Formats (MX) Specification 1.0; for the bytes, amd/Quark, quark/torch/utils/pack.py (Pack_fp6), and
their reader in vLLM, model_executor/layers/quantization/quark/schemes/quark_ocp_mx.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp6_compile.formats import FORMATS
from fp6_compile.layouts.packing import PLANES, pack
from fp6_compile.packed.slots import Slot, slots, undone_on_error, usable_device
from fp6_compile.packed.tensor import DTYPES, PackedTensor
from fp6_compile.report import LinearReport, Report, log_report, progress
from fp6_compile.storage.safetensors import Entry, folder_entries, read
from fp6_compile.storage.scaled import quantization

BLOCK = 32
_FORMATS = {f"fp6_{name}": name for name in ("e3m2", "e2m3")}


def is_mx(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's config.json says that Quark quantized it."""
    return (quantization(Path(folder)) or {}).get("quant_method") == "quark"


def load_quark_mxfp6(
    model: nn.Module, folder: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> Report:
    """Give `model` the weights of an MXFP6 checkpoint: quantized ones as PackedTensors in groups of 32, the rest unchanged.

    Args:
        model: of the checkpoint's class and configuration, best made under `init_empty_weights()`.
        folder: config.json and safetensors files.
        device: where to; None leaves every tensor where it is (a CPU for the meta device).

    Raises:
        ValueError: not written by Quark; a weight of another format; tensors missing or of a wrong shape or dtype; a scale
            that is NaN; no such device. The model is then as it was. A file that changes while it is read: parameters that
            were on the meta device are there again.
        FileNotFoundError, ImportError: no safetensors files; no safetensors library.
    """
    folder, chosen = Path(folder), usable_device(device)
    config = quantization(folder) or {}
    if config.get("quant_method") != "quark":
        raise ValueError(f"fp6: {folder}: config.json has no quantization_config of quant_method 'quark'")
    entries, found = folder_entries(folder), slots(model)
    plans = {id(slot): _plan(slot, entries, config) for slot in found}
    lines = []
    with undone_on_error(model):
        for slot in progress(found, "fp6: importing"):
            plan = plans[id(slot)]
            if plan is None:
                continue
            tensors = [tensor for _, tensor in read(plan[1], slot.device(chosen))]
            if len(tensors) == 1:
                slot.put(tensors[0].to(slot.tensor.dtype))
            else:
                packed = packed_tensor(tensors[0], tensors[1], plan[0], slot.tensor.dtype)
                slot.put(packed)
                about = slot.title, tuple(packed.shape), packed.dtype, packed.nbytes, packed.packed_bytes
                lines.append(LinearReport(*about))
    report = Report(tuple(lines), "/".join(sorted({plan[0] for plan in plans.values() if plan and plan[0]})))
    log_report(report)
    return report


def packed_tensor(weight: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> PackedTensor:
    """A PackedTensor of a checkpoint's `weight` [N, 3 K / 4] and `scale` [N, K / 32], uint8. ValueError for a NaN scale."""
    planes = pack(unpack_codes(weight), FORMATS[format], PLANES)
    return PackedTensor.from_planes(planes, e8m0(scale).T.contiguous(), format, BLOCK, weight.shape[1] // 3 * 4, dtype)


def unpack_codes(weight: Tensor) -> Tensor:
    """Codes [N, K] of bytes [N, 3 K / 4], both uint8."""
    a, b, c = weight.unflatten(1, (-1, 3)).unbind(2)
    return torch.stack([a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2], 2).flatten(1)


def e8m0(scale: Tensor) -> Tensor:
    """The float32 powers of two that E8M0 bytes stand for, exactly. ValueError for NaN (255)."""
    bits = scale.view(torch.uint8).to(torch.int32)
    if (bits == 255).any():
        raise ValueError("fp6: an E8M0 scale is NaN (255)")
    # 2^-127 is the one that float32 has only as a subnormal.
    return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)


def _plan(slot: Slot, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> tuple[str, list[Entry]] | None:
    """(format, the entries to read); the format is empty for a tensor that is not quantized."""
    name = next((name for name in slot.names if name in entries), None)
    if name is None:
        if slot.is_persistent or slot.tensor.is_meta:
            raise ValueError(f"fp6: {slot.names[0]} is not in the checkpoint")
        return None
    weight, scale = entries[name], entries.get(f"{name}_scale")
    shape = tuple(slot.tensor.shape)
    if scale is None:
        _expect(weight, shape, None)
        if not weight.fits(slot.tensor.dtype):
            raise ValueError(f"fp6: {name} is {weight.dtype} in the checkpoint and {slot.tensor.dtype} in the model")
        return "", [weight]
    format = _format(name.removesuffix(".weight"), config)
    if slot.tensor.dtype not in DTYPES:
        raise ValueError(
            f"fp6: {name} is {slot.tensor.dtype} in the model, MX needs one of {', '.join(map(str, DTYPES))}"
        )
    if len(shape) != 2 or shape[1] % BLOCK:
        raise ValueError(f"fp6: {name} is {list(shape)} in the model, MX needs inputs that are a multiple of {BLOCK}")
    _expect(weight, (shape[0], shape[1] // 4 * 3), ("U8",))
    _expect(scale, (shape[0], shape[1] // BLOCK), ("U8", "F8_E8M0"))
    for _, tensor in read([scale]):
        e8m0(tensor)
    return format, [weight, scale]


def _expect(entry: Entry, shape: tuple[int, ...], dtypes: tuple[str, ...] | None) -> None:
    if entry.shape != shape or (dtypes is not None and entry.dtype not in dtypes):
        wanted = f"{list(shape)}{' of ' + ' or '.join(dtypes) if dtypes else ''}"
        raise ValueError(
            f"fp6: {entry.name} is {list(entry.shape)} of {entry.dtype} in the checkpoint, expected {wanted}"
        )


def _format(layer: str, config: Mapping[str, Any]) -> str:
    try:
        by_layer = config.get("layer_quant_config") or {}
        chosen = next(
            (about for glob, about in by_layer.items() if fnmatchcase(layer, glob)), config.get("global_quant_config")
        )
        about = (chosen or {}).get("weight") or {}
        if isinstance(about, list):
            about = about[0] if len(about) == 1 else {}
        dtype, group = str(about.get("dtype")), about.get("group_size")
    except AttributeError as error:
        raise ValueError(f"fp6: {layer}: not a quantization_config of Quark's: {error}") from error
    if dtype not in _FORMATS or group != BLOCK:
        raise ValueError(
            f"fp6: {layer} is {dtype!r} in groups of {group}; read are {sorted(_FORMATS)} in groups of {BLOCK}"
        )
    return _FORMATS[dtype]
