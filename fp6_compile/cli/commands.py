"""The commands that make and describe packed folders."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

import fp6_compile
from fp6_compile.checkpoint.manifest import Manifest, is_packed
from fp6_compile.checkpoint.mx import is_mx, load_quark_mxfp6
from fp6_compile.checkpoint.packed_weight import PackedWeight
from fp6_compile.checkpoint.save_model import save
from fp6_compile.cli.folder import empty_model
from fp6_compile.cli.table import table
from fp6_compile.cli.token import one_token
from fp6_compile.config import QuantConfig
from fp6_compile.packed.quantize_model import quantize_
from fp6_compile.report import size_text
from fp6_compile.storage.files import member

# In a folder that is being made.
_UNFINISHED = ".fp6-compile-unfinished"

# What is not copied beside the packed weights: the weights, and the configuration, which `save` writes.
_NOT_COPIED = (
    "config.json",
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
    the 16-bit model need not fit in memory. An MXFP6 folder of AMD Quark's is converted exactly; FP8 and int8
    weights with scales are dequantized first."""
    source, target = arguments.source, arguments.target
    if source.resolve() == target.resolve():
        raise ValueError(f"DST is SRC, {source}")
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / _UNFINISHED).exists())):
        raise ValueError(f"{target} is there already and not an empty folder")
    model = empty_model(source, arguments.dtype, arguments.trust_remote_code)
    others = _others(source)
    if is_mx(source):
        report = load_quark_mxfp6(model, source, device=arguments.device)
    else:
        config = QuantConfig(arguments.format, arguments.group_size, arguments.scale, arguments.skip)
        report = quantize_(model, config, device=arguments.device, source=source)
    print(report)
    if not report.quantized:
        raise ValueError("no linear was packed, so nothing is saved (a float32 model: try --dtype bfloat16)")
    with _being_made(target):
        for file in others:
            shutil.copy2(file, target / file.name)
        save(model, target)
    print(f"saved in {target}")
    return 0


def _others(source: Path) -> list[Path]:
    """What is copied: SRC's other files. ValueError for a link that leads out of SRC."""
    found = []
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(glob) for glob in _NOT_COPIED):
            try:
                found.append(member(source, file.name))
            except ValueError as error:
                raise ValueError(f"cannot copy {file}: {error}") from error
    return found


@contextlib.contextmanager
def _being_made(target: Path) -> Iterator[None]:
    """DST holds a mark until it is whole: what an interrupted run left there is no obstacle, and is removed."""
    mark, is_new = target / _UNFINISHED, not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        mark.touch()
        _remove_files(target, but=mark)
        yield
        mark.unlink()
    except BaseException:
        if target.exists():
            _remove_files(target, but=mark)
            mark.unlink(missing_ok=True)
            if is_new:
                target.rmdir()
        raise


def _remove_files(folder: Path, but: Path) -> None:
    for file in folder.iterdir():
        if file != but:
            file.unlink()


def explain(arguments: argparse.Namespace) -> int:
    """Explain one decoded token: linears, graph breaks, CUDA graphs, kernels, predicted time. Reads no 16-bit weights."""
    model = empty_model(arguments.folder, "auto", arguments.trust_remote_code)
    if is_packed(arguments.folder):
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
            weight.spec.format,
            str(weight.spec.group_size or "row"),
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


def _bytes(manifest: Manifest, name: str, weight: PackedWeight) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in weight.tensors(name).values())
