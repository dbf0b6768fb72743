"""Memory and time of calibrate_ on a model of a billion parameters: `python -m benchmarks.calibration`.

The 1.1 B Llama shape (22 blocks of width 2048), random BF16 weights, in safetensors files. Each algorithm
runs in a process of its own, on a model whose parameters are on the meta device: blocks are read when their turn comes.

*resident*: the most anonymous memory above what the process held before, sampled every 5 ms. Beside it are its parts: the
packed model, a block's 16-bit weights (or the largest weight, the head), and a block's Hessians, which only GPTQ keeps.

It prints its rows, and last one line of JSON. --json writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fp6_compile
from benchmarks.decode.model.llama import SIZES
from benchmarks.system.environment import cpu
from benchmarks.system.memory import resident_peak
from examples.code_lm.model import CodeLM
from fp6_compile.calibration.algorithms import GPTQ, Algorithm, Weighted

ALGORITHMS: dict[str, Algorithm] = {"weighted": Weighted(steps=16), "gptq": GPTQ()}


def write_source(folder: Path, size: str) -> None:
    """The 16-bit model in safetensors files of a block each."""
    from safetensors.torch import save_file

    with torch.device("meta"):
        parameters = dict(CodeLM(SIZES[size]).named_parameters())
    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in parameters:
        files.setdefault(name.split(".")[1] if name.startswith("layers.") else "rest", []).append(name)
    for part, names in files.items():
        save_file({n: random(n, parameters[n].shape, generator) for n in names}, folder / f"model-{part}.safetensors")


def random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms of one; embeddings and linears that keep activations near one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    std = 0.5 if name.startswith("embedding") else 0.5 * shape[1] ** -0.5
    return torch.randn(shape, generator=generator).mul_(std).bfloat16()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calibrate in this process."""
    config = SIZES[arguments.size]
    torch.set_default_dtype(torch.bfloat16)
    with fp6_compile.init_empty_weights():
        model = CodeLM(config)
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(config.vocab, (1, 128), generator=generator) for _ in range(arguments.tokens // 128)]
    algorithm = ALGORITHMS[arguments.algorithm]
    found: dict[str, Any] = {"algorithm": repr(algorithm), "tokens": arguments.tokens}
    how = {"format": arguments.format, "group_size": arguments.group_size}
    start = time.process_time()
    with resident_peak(found):
        report = fp6_compile.calibrate_(model, inputs, algorithm=algorithm, source=arguments.folder, **how)
    found["cpu_seconds"] = round(time.process_time() - start, 1)
    block = [m for m in model.layers[0].modules() if isinstance(m, nn.Linear)]
    found["packed_mb"] = _mb(sum(getattr(p, "packed_bytes", p.nbytes) for p in model.parameters()))
    found["block_mb"] = _mb(sum(m.weight.nbytes for m in block))
    found["largest_mb"] = _mb(max(line.bytes_before for line in report.linears))
    # q, k and v share one; so do gate and up.
    found["hessians_mb"] = _mb(4 * (3 * config.dim**2 + config.hidden**2)) if arguments.algorithm == "gptq" else 0
    found["linears"] = f"{len(report.quantized)} of {len(report.linears)}"
    found["parameters_m"] = round(sum(line.shape[0] * line.shape[1] for line in report.quantized) / 1e6)
    return found


def main() -> None:
    """Parse, measure, print."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.algorithm:
        print(json.dumps(run(arguments)))
        return
    about = {**cpu(), "size": arguments.size, "format": arguments.format, "group_size": arguments.group_size}
    about["note"] = arguments.note
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    rows = []
    try:
        write_source(folder, arguments.size)
        for name in ALGORITHMS:
            command = [sys.executable, "-m", "benchmarks.calibration", *sys.argv[1:], "--algorithm", name]
            done = subprocess.run([*command, "--folder", str(folder)], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({**about, "rows": rows}) + "\n")
    finally:
        shutil.rmtree(folder)
    print(json.dumps({**about, "rows": rows}))


def _mb(count: float) -> int:
    return round(count / 1e6)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--tokens", type=int, default=512, help="of calibration, in inputs of 128")
    parser.add_argument("--format", default="e2m3")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--folder", type=Path, help="where to put 2 GB of files; by default a temporary folder")
    parser.add_argument("--note", help="what else the reader should know, such as a busy machine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--algorithm", choices=ALGORITHMS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
