"""Peak memory of transformers' from_pretrained on a model of a billion parameters: `python -m benchmarks.hf_memory`.

A random Llama of Llama-3.2-1B's shape (16 blocks of width 2048, a head that is tied to the embedding of 128256 tokens, 1.2 G
parameters) in sharded BF16 safetensors. Each step runs in a process of its own, and then eight tokens go through the model:

    source     write the files
    plain      from_pretrained
    quantize   from_pretrained(quantization_config=Fp6Config()); the packed model is then saved
    packed     from_pretrained of the packed folder

*peak*: the most resident memory (VmHWM) above what the process had before, files that are mapped among it: transformers maps
checkpoints, and pages that were read count until they are unmapped. *anonymous*: the same without files, sampled every 5 ms;
it is what the system cannot drop.

It prints a table, and last one line of JSON. --json writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate

import fp6_compile
from benchmarks.system.environment import cpu
from benchmarks.system.memory import peak, resident, resident_peak

STEPS = ("source", "plain", "quantize", "packed")
WIDTH, HIDDEN, BLOCKS, TOKENS = 2048, 8192, 16, 128256
SHARD = "1GB"


def write_source(folder: Path, blocks: int, tokens: int) -> None:
    """The 16-bit model."""
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": blocks,
        "vocab_size": tokens,
    }
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes, **heads, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=SHARD)


def load_and_run(folder: Path, **how: Any) -> tuple[Any, dict[str, Any]]:
    """The loaded model, and what that took."""
    before, found = resident("cpu"), dict[str, Any]()
    with resident_peak(found), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
        model(torch.arange(8)[None])
    found["peak_mb"] = round(((peak("cpu") or 0) - (before or 0)) / 1e6)
    found["anonymous_peak_mb"] = found.pop("resident_peak_mb")
    sizes = [getattr(p, "packed_bytes", p.nbytes) for p in model.parameters()]
    return model, {**found, "model_mb": round(sum(sizes) / 1e6), "largest_mb": round(_largest(model) / 1e6)}


def _largest(model: Any) -> int:
    return max(parameter.nbytes for parameter in model.parameters())


def run_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """One step, in this process."""
    source, packed = arguments.folder / "source", arguments.folder / "packed"
    if arguments.step == "source":
        write_source(source, arguments.blocks, arguments.tokens)
        return {}
    if arguments.step == "quantize":
        model, found = load_and_run(source, quantization_config=fp6_compile.Fp6Config())
        model.save_pretrained(packed, max_shard_size=SHARD)
        return found
    return load_and_run(source if arguments.step == "plain" else packed)[1]


def main() -> None:
    arguments = _arguments()
    if arguments.step:
        print(json.dumps({"step": arguments.step, **run_step(arguments)}))
        return
    about = {**cpu(), "transformers": transformers.__version__}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        rows = [row for name in STEPS if len(row := _in_a_process(name, folder, arguments)) > 1]
    finally:
        shutil.rmtree(folder)
    print(tabulate(rows, headers="keys", tablefmt="plain"))
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "rows": rows}) + "\n")
    print(json.dumps({**about, "rows": rows}))


def _in_a_process(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.hf_memory", "--step", name, "--folder", str(folder)]
    command += ["--blocks", str(arguments.blocks), "--tokens", str(arguments.tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--folder", type=Path, help="where to put 4 GB of files; by default a temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
