"""`fp6-compile`: model folders from the command line.

    fp6-compile quantize SRC DST    a transformers folder, or one that AMD Quark made, to a packed folder
    fp6-compile explain DIR         what torch.compile would make of a token, on any GPU, without running it
    fp6-compile inspect DIR         what a packed folder holds
    fp6-compile verify DIR          every byte as it was written; with --against SRC, every code the nearest to SRC's weight

    commands    quantize, explain and inspect      <- start here
    verify      verify
    folder      an empty model from a transformers folder
    token       the call that decodes one token
    table       text tables

Exit codes: 0 done, 1 a folder that is damaged or does not match, 2 wrong usage, missing files or packages, 130 interrupted.
Code from a model folder is run with --trust-remote-code and never without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fp6_compile
from fp6_compile.checkpoint.packed_weight import CheckpointError
from fp6_compile.cli.commands import explain, inspect, quantize
from fp6_compile.cli.verify import verify
from fp6_compile.formats import DEFAULT, FORMATS
from fp6_compile.quantize import SCALES

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    try:
        parsed = _parser().parse_args(arguments)
        return int(parsed.run(parsed))
    except CheckpointError as error:
        return _fail(1, error)
    except (ValueError, OSError, ImportError) as error:
        return _fail(2, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _fail(code: int, error: Exception | str) -> int:
    text = " ".join(str(error).split())
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
        default=DEFAULT,
        choices=["auto", *sorted(FORMATS)],
        metavar="FORMAT",
        help="e2m3 (default), e3m2, auto (the better of these, layer by layer), or another eXmY of 3 to 8 bits",
    )
    command.add_argument(
        "--group-size", type=int, metavar="N", help="inputs that share a scale; without it a whole row"
    )
    command.add_argument("--scale", default="absmax", choices=SCALES, help="default: absmax")
    command.add_argument(
        "--skip", action="append", default=[], metavar="GLOB", help="modules that are not quantized; may be repeated"
    )
    command.add_argument(
        "--dtype", default="auto", choices=["auto", "float16", "bfloat16"], help="default: the folder's own"
    )
    command.add_argument("--device", default="cpu", help="where to quantize; default: cpu")
    _add_trust(command)
    command.set_defaults(run=quantize)

    command = commands.add_parser("explain", help="what compiling would do", description=explain.__doc__)
    command.add_argument("folder", metavar="DIR", type=Path, help="a transformers folder, packed or not")
    command.add_argument("--device", metavar="NAME", help='"H200", "RTX 4090", ...; default: this machine\'s CPU')
    command.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of KV cache; default: 1024")
    command.add_argument("--html", metavar="FILE", type=Path, help="write a page, too")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_trust(command)
    command.set_defaults(run=explain)

    command = commands.add_parser("inspect", help="what a packed folder holds", description=inspect.__doc__)
    command.add_argument("folder", metavar="DIR", type=Path)
    command.set_defaults(run=inspect)

    command = commands.add_parser("verify", help="check a packed folder", description=verify.__doc__)
    command.add_argument("folder", metavar="DIR", type=Path)
    command.add_argument("--against", metavar="SRC", type=Path, help="the folder it was made from")
    command.set_defaults(run=verify)
    return parser


def _add_trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the folder brings for its model"
    )
