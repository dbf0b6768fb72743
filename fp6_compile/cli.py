"""`fp6-compile`: model folders from the command line.

    fp6-compile quantize SRC DST    a transformers folder, or one that AMD Quark made, to a packed folder
    fp6-compile inspect DIR         what a packed folder holds
    fp6-compile verify DIR          every byte as it was written; with --against SRC, every code the nearest to SRC's weight

Exit codes: 0 done, 1 a folder that is damaged or does not match, 2 wrong usage, missing files or packages.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fp6_compile
from fp6_compile.checkpoint import save
from fp6_compile.formats import FORMATS, get_format
from fp6_compile.manifest import CheckpointError, Manifest, Weight
from fp6_compile.model import empty_parameters, quantize_
from fp6_compile.mx import is_mx, load_mx
from fp6_compile.packing import PLANES, unpack
from fp6_compile.quantize import SCALES, dequantize
from fp6_compile.report import progress, size_text
from fp6_compile.storage import folder_entries, read

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except CheckpointError as error:
        return _fail(1, error)
    except (ValueError, OSError, ImportError) as error:
        return _fail(2, error)


def _fail(code: int, error: Exception) -> int:
    text = str(error)
    print(text if text.startswith("fp6: ") else f"fp6: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fp6-compile", description="Six-bit weights: pack a model folder, look into it, check it."
    )
    parser.add_argument(
        "--version", action="version", version=f"fp6_compile {fp6_compile.__version__}, torch {torch.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("quantize", help="pack a model folder", description=quantize.__doc__)
    command.add_argument(
        "source", metavar="SRC", type=Path, help="a transformers folder: config.json and safetensors files"
    )
    command.add_argument("target", metavar="DST", type=Path, help="a folder to make")
    command.add_argument(
        "--format",
        default="e3m2",
        choices=["auto", *sorted(FORMATS)],
        metavar="FORMAT",
        help="e3m2 (default), e2m3, auto (the better of these, layer by layer), or another eXmY of 3 to 8 bits",
    )
    command.add_argument(
        "--group-size", type=int, metavar="N", help="inputs that share a scale; without it a whole row"
    )
    command.add_argument("--scale", default="absmax", choices=SCALES, help="default: absmax")
    command.add_argument(
        "--skip", action="append", default=[], metavar="GLOB", help="modules to leave alone; may be repeated"
    )
    command.add_argument(
        "--dtype", default="auto", choices=["auto", "float16", "bfloat16"], help="default: the folder's own"
    )
    command.add_argument("--device", default="cpu", help="where to quantize; default: cpu")
    command.set_defaults(run=quantize)

    command = commands.add_parser("inspect", help="what a packed folder holds", description=inspect.__doc__)
    command.add_argument("folder", metavar="DIR", type=Path)
    command.set_defaults(run=inspect)

    command = commands.add_parser("verify", help="check a packed folder", description=verify.__doc__)
    command.add_argument("folder", metavar="DIR", type=Path)
    command.add_argument("--against", metavar="SRC", type=Path, help="the folder it was made from")
    command.set_defaults(run=verify)
    return parser


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
    _table(rows)
    packed = sum(_bytes(manifest, name, weight) for name, weight in manifest.weights.items())
    stood_for = sum(w.shape[0] * w.shape[1] * w.dtype.itemsize for w in manifest.weights.values())
    print(
        f"\n{len(manifest.weights)} packed weights, {size_text(stood_for)} -> {size_text(packed)}; "
        f"{len(manifest.plain)} other tensors, {size_text(manifest.bytes - packed)}; {len(manifest.tied)} tied"
    )
    return 0


def _bytes(manifest: Manifest, name: str, weight: Weight) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in weight.tensors().values())


def verify(arguments: argparse.Namespace) -> int:
    """Check sizes, hashes, shapes, dtypes and scales. With --against, compare with the 16-bit folder: every code must be the
    nearest to its weight, and every other tensor the same."""
    manifest = Manifest.read(arguments.folder)
    print(f"{arguments.folder}: whole, {len(manifest.weights)} packed weights, {len(manifest.plain)} other tensors")
    if arguments.against is None:
        return 0
    originals = folder_entries(arguments.against)
    rows, bad = [("weight", "SQNR dB", "verdict")], 0
    for name in progress([*manifest.weights, *manifest.plain], "fp6: verifying"):
        entry = originals.get(name)
        if entry is None:
            verdict, noise = "not in SRC", None
        else:
            verdict, noise = _compare(manifest, name, next(read([entry]))[1])
        optional = entry is None and name in manifest.plain  # buffers that no checkpoint has
        bad += verdict != "same" and not optional
        if name in manifest.weights or (verdict != "same" and not optional):
            rows.append((name.removesuffix(".weight"), "" if noise is None else f"{noise:.2f}", verdict))
    _table(rows)
    print(f"\n{bad} differ" if bad else "\nall match")
    return 1 if bad else 0


def _compare(manifest: Manifest, name: str, original: Tensor) -> tuple[str, float | None]:
    if name in manifest.plain:
        (_, mine), *_ = read([manifest.plain[name]])
        same = mine.shape == original.shape and torch.equal(mine, original.to(mine.dtype))
        return "same" if same else "differs", None
    weight = manifest.weights[name]
    if tuple(original.shape) != tuple(weight.shape) or not original.is_floating_point():
        return f"SRC has {original.dtype} {list(original.shape)}", None
    *planes, scale = (t for _, t in read(manifest.entries[f"{name}.{suffix}"] for suffix in weight.tensors()))
    fmt, original = get_format(weight.format), original.float()
    codes = unpack(planes, fmt, PLANES, *weight.shape)
    per_weight = scale.T.repeat_interleave(weight.group_size or weight.shape[1], 1)[:, : weight.shape[1]]
    nearest = torch.equal(fmt.encode(original / per_weight), codes)
    error = dequantize(codes, scale, fmt, weight.group_size, torch.float32) - original
    noise = float(10 * torch.log10(original.square().sum() / error.square().sum()))
    return "same" if nearest else "codes are not the nearest", noise


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]))
