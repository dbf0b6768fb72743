"""vLLM's tokens of packed models beside those of the dequantized ones, into benchmarks/results/vllm_cpu.json.

Each line is an engine of its own, 32 requests at once, in float32, where the two differ by the order of sums alone: in
BF16 a near tie of two tokens may go either way, so its lines say how many requests agree to the last token; how often it
does so without six bits is the line of the dequantized model, compiled. About 15 minutes on two cores. Needs vLLM
(docs/guide/vllm.md).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.serving.models import CONFIGS, make, pack
from benchmarks.serving.worker import REQUESTS, TOKENS
from benchmarks.system.environment import ROOT, cpu

RESULTS = ROOT / "benchmarks" / "results" / "vllm_cpu.json"
FP32, BF16, EAGER = {"dtype": "float32"}, {"dtype": "bfloat16"}, {"enforce_eager": True}
ONLINE = {"quantization": "fp6"}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("packed", FP32 | EAGER),
    ("packed", FP32),
    ("packed", FP32 | EAGER | {"tensor_parallel_size": 2}),
    ("packed", FP32 | {"tensor_parallel_size": 2}),
    ("16 bits", FP32 | EAGER | ONLINE),
    ("packed", BF16 | EAGER),
    ("packed", BF16),
    ("dequantized", BF16),
)


def run(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What benchmarks.serving.worker says of `folder`. Raises CalledProcessError if the engine fails."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.serving.worker", str(folder), json.dumps(settings), file.name]
        subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(Path(file.name).read_text())
    return found


def compare(kind: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of a model."""
    folders = {name: folder / name for name in ("16 bits", "packed", "dequantized")}
    make(kind, folders["16 bits"])
    pack(folders["16 bits"], folders["packed"], folders["dequantized"])
    references = {how["dtype"]: run(folders["dequantized"], how | EAGER)["tokens"] for how in (FP32, BF16)}
    rows = []
    for name, settings in CASES:
        found, expected = run(folders[name], settings), references[settings["dtype"]]
        equal = [sum(map(list.__eq__, expected, found[each])) for each in ("tokens", "again")]
        rows.append(
            {
                "model": kind,
                "folder": name,
                **settings,
                "requests": REQUESTS,
                "equal": equal[0],
                "equal_from_prefix_cache": equal[1],
                "prompt_tokens_from_cache": found["cached"],
                "start_s": found["start_s"],
                "generate_s": found["generate_s"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run all cases, write the file; exit code 1 if tokens in float32 differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for kind in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(kind, Path(folder))
    versions = {name: importlib.metadata.version(name) for name in ("transformers", _distribution())}
    about = {**cpu(), **versions, "tokens": TOKENS, "format": "e2m3"}
    arguments.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    sys.exit(any(row["equal"] < REQUESTS for row in rows if row["dtype"] == "float32"))


def _distribution() -> str:
    return sorted(set(importlib.metadata.packages_distributions()["vllm"]))[0]


if __name__ == "__main__":
    main()
