"""The commands that make and describe packed folders."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn

import fp6_compile
from fp6_compile.checkpoint import save
from fp6_compile.cli.table import table
from fp6_compile.explanation.token import one_token
from fp6_compile.manifest import INDEX, Manifest, Weight
from fp6_compile.model import quantize_
from fp6_compile.mx import is_mx, load_mx
from fp6_compile.places import empty_parameters
from fp6_compile.report import size_text

# What is not copied beside the packed weights: the weights.
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
)


def quantize(arguments: argparse.Namespace) -> int:
    """Pack the linears of a transformers model and save it in DST, with SRC's other files beside it. One tensor at a time:
    the 16-bit model need not fit in memory. An MXFP6 folder of AMD Quark's is taken over as it is, exactly."""
    source, target = arguments.source, arguments.target
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: not a transformers model folder")
    if source.resolve() == target.resolve():
        raise ValueError(f"DST is SRC, {source}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already and not an empty folder")
    model = _empty_model(source, arguments.dtype)
    if is_mx(source):
        report = load_mx(model, source, device=arguments.device)
    else:
        how = {
            "format": arguments.format,
            "group_size": arguments.group_size,
            "scale": arguments.scale,
            "skip": arguments.skip,
        }
        report = quantize_(model, **how, device=arguments.device, source=source)
    print(report)
    if not report.taken:
        raise ValueError("no linear was packed, so nothing is saved (a float32 model: try --dtype bfloat16)")
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not any(file.match(glob) for glob in _WEIGHTS):
            shutil.copy2(file, target / file.name)
    save(model, target)
    print(f"saved in {target}")
    return 0


def _empty_model(folder: Path, dtype: str) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is needed to read a model folder: pip install transformers") from error
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [None])[0]
    if name is None or not hasattr(transformers, name):
        raise ValueError(
            f"{folder / 'config.json'}: architecture {name!r} is not in transformers {transformers.__version__}"
        )
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    chosen = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    before = torch.get_default_dtype()
    with empty_parameters():
        torch.set_default_dtype(chosen or before)
        try:
            model: nn.Module = getattr(transformers, name)(config)
        finally:
            torch.set_default_dtype(before)
    return model.eval()


def explain(arguments: argparse.Namespace) -> int:
    """Explain one decoded token: linears, graph breaks, CUDA graphs, kernels, predicted time. Reads no 16-bit weights."""
    model = _empty_model(arguments.folder, "auto")
    if (arguments.folder / INDEX).is_file():
        fp6_compile.load(model, arguments.folder)
    with torch.no_grad():
        call = one_token(model, arguments.context)
        found = fp6_compile.explain(model, device=arguments.device, mode="reduce-overhead", **call)
    print(found.json() if arguments.json else found)
    if arguments.html:
        arguments.html.write_text(found.html(), encoding="utf-8")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """List the packed weights of a folder and what else is in it."""
    manifest = Manifest.read(arguments.folder)
    rows = [("weight", "shape", "format", "group", "dtype", "bytes", "bits")]
    for name, weight in manifest.weights.items():
        count, used = _bytes(manifest, name, weight), weight.shape[0] * weight.shape[1]
        about = (
            name.removesuffix(".weight"),
            "x".join(map(str, weight.shape)),
            weight.format,
            str(weight.group_size or "row"),
        )
        rows.append((*about, str(weight.dtype).removeprefix("torch."), size_text(count), f"{8 * count / used:.2f}"))
    table(rows)
    packed = sum(_bytes(manifest, name, weight) for name, weight in manifest.weights.items())
    stood_for = sum(w.shape[0] * w.shape[1] * w.dtype.itemsize for w in manifest.weights.values())
    print(
        f"\n{len(manifest.weights)} packed weights, {size_text(stood_for)} -> {size_text(packed)}; "
        f"{len(manifest.plain)} other tensors, {size_text(manifest.bytes - packed)}; {len(manifest.tied)} tied"
    )
    return 0


def _bytes(manifest: Manifest, name: str, weight: Weight) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in weight.tensors().values())
