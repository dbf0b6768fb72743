"""The command line of benchmarks.decode."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch

from benchmarks.decode.loop import Sampling
from benchmarks.decode.measure import PROVIDERS, Settings
from benchmarks.decode.model.llama import SIZES
from fp6_compile.cli.folder import read_config
from fp6_compile.formats import DEFAULT, FORMATS


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Settings]]:
    """The arguments, and what each provider is told. Exits with a message that names the argument that is wrong."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    cuda = arguments.device == "cuda"
    arguments.backends = arguments.backends or _available(cuda, arguments.dtype)
    arguments.alone = cuda if arguments.alone is None else arguments.alone
    _check(parser, arguments)
    arguments.model = arguments.model or arguments.size
    sampling = Sampling(arguments.temperature, arguments.top_k)
    packing = {"format": arguments.format, "group_size": arguments.group_size}
    shared = {
        "model": arguments.model,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "steps": arguments.steps_per_graph,
        "threads": arguments.threads,
        "head": "float" if arguments.head == 16 else None,
        "sampling": sampling,
        "lora": arguments.lora,
        "packing": packing,
        "trust_remote_code": arguments.trust_remote_code,
    }
    return arguments, [Settings(provider, **shared) for provider in arguments.backends]


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    cuda, steps = arguments.device == "cuda", arguments.steps_per_graph
    if arguments.model is not None and not Path(arguments.model).is_dir():
        parser.error(f"--model: got {arguments.model}, which is no folder")
    if arguments.model is not None:
        try:
            read_config(Path(arguments.model), arguments.trust_remote_code)
        except ValueError as error:
            parser.error(f"--model: {error}")
    if arguments.tokens % steps or arguments.tokens // steps < 3:
        parser.error(
            f"--tokens: got {arguments.tokens}, need a multiple of --steps-per-graph ({steps}), at least three times"
        )
    if arguments.temperature < 0:
        parser.error(f"--temperature: got {arguments.temperature}, need 0 (greedy) or more")
    if cuda and not torch.cuda.is_available():
        parser.error("--device: got cuda, and there is none")
    for name in {"int8", "int4"} & set(arguments.backends):
        if importlib.util.find_spec("torchao") is None:
            parser.error(f"--backends: {name} needs torchao, which is not installed")
        if name == "int4" and not (cuda and arguments.dtype == "bf16"):
            parser.error("--backends: int4 needs --device cuda and --dtype bf16")


def _available(cuda: bool, dtype: str) -> list[str]:
    names = ["eager", "inductor", "fp6"]
    if importlib.util.find_spec("torchao") is not None:
        names += ["int8", "int4"] if cuda and dtype == "bf16" else ["int8"]
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", default="tiny", choices=SIZES)
    add("--model", help="a folder with a transformers model, instead of a size")
    add("--trust-remote-code", action="store_true", help="run Python code that the --model folder brings along")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--dtype", default="bf16", choices=["bf16", "fp16"], help="of everything that is not packed")
    add("--batch", type=_positive, nargs="+", default=[1], help="batch sizes")
    add("--prompt", type=_positive, default=64, help="tokens of the prompt")
    add("--tokens", type=_positive, default=64, help="of a round")
    add("--steps-per-graph", type=_positive, default=1, metavar="N", help="tokens in one graph")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=_positive, default=50, help="drawn from, above temperature 0")
    add("--rounds", type=_positive, default=3, help="turns of each backend")
    add("--threads", type=_positive, help="torch.set_num_threads")
    add("--backends", nargs="+", choices=PROVIDERS, help="default: all that can run here")
    finite = [
        name for name, fmt in FORMATS.items() if fmt.exponent_bits < 5
    ]  # random codes of others are infinite, too
    add("--format", default=DEFAULT, choices=finite, metavar="FORMAT", help=f"eXmY; default: {DEFAULT}")
    add("--group-size", type=_positive, help="inputs that share a scale; without it a row")
    add("--head", type=int, choices=[16], help="bits of the head, which is packed as the rest without it")
    add(
        "--lora", type=_positive, metavar="RANK", help="an adapter beside every linear, and what a swap and a fuse cost"
    )
    alone = parser.add_mutually_exclusive_group()
    add_alone = alone.add_argument
    add_alone("--alone", action="store_true", default=None, help="one process after the other; so it is on a GPU")
    add_alone("--turns", dest="alone", action="store_false", help="processes take turns; so it is on a CPU")
    add("--once", action="store_true", help="no second process to see how long a cached compilation takes")
    add("--out", type=Path, help="a file for the JSON document, written as results come")
    add("--plot", type=Path, help="a picture of where the time of a token goes")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, need a positive number")
    return value
