"""Memory and time of quantize_, save and load on a model of a billion parameters: `python -m benchmarks.packing`.

A decoder of Llama-3.2-1B's shape (16 blocks of width 2048, an embedding of 128256 tokens and a head of its own, 1.5 G
parameters), random BF16 weights. Each step runs in a process of its own:

    source      write the 16-bit safetensors files that the others read
    memory      quantize_ a 16-bit model that is in memory
    stream      quantize_ from those files, parameters on the meta device
    save        the packed model
    load        it, parameters on the meta device

*tensors*: most bytes of tensor storages that the step has touched and that are alive at once, files that are mapped among
them, seen at every operator (in a run of its own, because watching takes time). *resident*: most anonymous memory above what
the process held before, sampled every 5 ms. Seconds per GB are of 16-bit weights that are packed; reading them once, by the
fastest of torch's reductions, is the yardstick.

It prints a table, and last one line of JSON. --json writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fp6_compile
from benchmarks.system.bandwidth import read_bandwidth
from benchmarks.system.environment import cpu
from benchmarks.system.memory import resident_peak

STEPS = ("memory", "stream", "save", "load")
WIDTH, HIDDEN, BLOCKS, TOKENS = 2048, 8192, 16, 128256


class Block(nn.Module):
    """The linears of a decoder block; they need not be called."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, 512), "v": (WIDTH, 512), "o": (WIDTH, WIDTH)}
        shapes |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        for name, (k, n) in shapes.items():
            setattr(self, name, nn.Linear(k, n, bias=False))


def make(blocks: int, tokens: int) -> nn.Module:
    """The model, in BF16."""
    parts = {"embed": nn.Embedding(tokens, WIDTH), "head": nn.Linear(WIDTH, tokens, bias=False)}
    return nn.ModuleDict({**parts, "blocks": nn.ModuleList(Block() for _ in range(blocks))}).bfloat16()


class TensorPeak(TorchDispatchMode):
    """The most bytes of tensor storages that were alive at the same time, checked after every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bound = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta:
                self.watch(tensor)
        return out

    def watch(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage, once."""
        storage = tensor.untyped_storage()
        known = self.sizes.get(storage._cdata)
        if known is None or known[0].expired():
            self.sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.bound += storage.nbytes()
            if self.bound > self.most:  # an upper bound: subtract the storages that are gone
                self.sizes = {key: (ref, size) for key, (ref, size) in self.sizes.items() if not ref.expired()}
                self.bound = sum(size for _, size in self.sizes.values())
                self.most = max(self.most, self.bound)


def step(name: str, folder: Path, blocks: int, tokens: int) -> tuple[nn.Module, Callable[[], Any]]:
    """The model before a step, and the step as a function."""
    source, packed = folder / "source", folder / "packed"
    if name == "memory":
        model = make(blocks, tokens)
        return model, lambda: fp6_compile.quantize_(model)
    if name == "save":
        model = make(blocks, tokens)
        fp6_compile.quantize_(model)
        return model, lambda: fp6_compile.save(model, packed)
    with fp6_compile.init_empty_weights():
        model = make(blocks, tokens)
    if name == "stream":
        return model, lambda: fp6_compile.quantize_(model, source=source)
    return model, lambda: fp6_compile.load(model, packed)


def run_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one step in this process."""
    found: dict[str, Any] = {"step": arguments.step}
    model, call = step(arguments.step, arguments.folder, arguments.blocks, arguments.tokens)
    if arguments.watch == "tensors":
        with TensorPeak() as peak:
            call()
        found["tensor_peak_mb"] = round(peak.most / 1e6)
    else:
        with resident_peak(found):
            call()
    sizes = [getattr(p, "packed_bytes", p.nbytes) for p in model.parameters()]
    packed = [p for p in model.parameters() if isinstance(p, fp6_compile.PackedTensor)]
    found["model_mb"] = round(sum(sizes) / 1e6)
    found["largest_mb"] = round(max(p.nbytes for p in model.parameters()) / 1e6)
    found["packed_from_gb"] = round(sum(p.nbytes for p in packed) / 1e9, 3)
    return found


def write_source(folder: Path, blocks: int, tokens: int) -> None:
    """The 16-bit model in safetensors files of a block each."""
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    for i in range(blocks + 1):
        model = make(1, 8) if i < blocks else make(0, tokens)
        names = {n: p for n, p in model.state_dict().items() if n.startswith("blocks") == (i < blocks)}
        save_file(
            {n.replace("blocks.0", f"blocks.{i}"): p for n, p in names.items()}, folder / f"model-{i}.safetensors"
        )


def main() -> None:
    arguments = _arguments()
    if arguments.step:
        print(json.dumps(run_step(arguments)))
        return
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    about = {**cpu(), "read_gb_s": round(read_bandwidth(time.perf_counter), 1)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_source(folder / "source", arguments.blocks, arguments.tokens)
        rows = [_measure(name, folder, arguments) for name in STEPS]
    finally:
        shutil.rmtree(folder)
    for row in rows:
        row["seconds_per_gb"] = round(row["seconds"] / row["packed_from_gb"], 2)
        row["times_reading"] = round(row["seconds_per_gb"] * about["read_gb_s"], 1)
    _show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}) + "\n")
    print(json.dumps({**about, "rows": rows}))


def _measure(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for watch in ("tensors", "resident"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.packing",
            "--step",
            name,
            "--watch",
            watch,
            "--folder",
            str(folder),
        ]
        command += ["--blocks", str(arguments.blocks), "--tokens", str(arguments.tokens)]
        row |= json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    return row


def _show(rows: list[dict[str, Any]]) -> None:
    columns = ["step", "seconds", "seconds_per_gb", "times_reading"]
    columns += ["tensor_peak_mb", "resident_peak_mb", "model_mb", "largest_mb"]
    print(tabulate([[row[column] for column in columns] for row in rows], columns, tablefmt="plain"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--folder", type=Path, help="where to put 4 GB of files; by default a temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--watch", choices=["tensors", "resident"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
