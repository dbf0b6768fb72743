"""The main job on real input: a code model in six bits, next to itself in sixteen.

    python -m examples.demo        (or: make demo)

Takes the byte-level Llama of examples/code_lm (trained on the Python standard library). Shows what `quantize_` costs in
held-out bits per byte, then compiles the model with backend="fp6" and shows how long a token takes, what was quantized, and
what it writes. All figures are measured when you run it, on the device you run it on.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fp6_compile
from examples.code_lm.checkpoint import load_pretrained, read_metadata
from examples.code_lm.data import bits_per_byte, held_out_windows, load_split
from examples.code_lm.generate import stream
from examples.code_lm.model import CodeLM, KVCache
from fp6_compile import Report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16
PROMPT = b'''class Stack:
    """A list that is used from one end."""

    def __init__(self):
        self.items = []

    def push('''
# (label, options)
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("E3M2, per channel", {"format": "e3m2"}),
    ("E3M2, groups of 64", {"format": "e3m2", "group_size": 64}),
    ("E2M3, per channel", {"format": "e2m3"}),
    ("E2M3, groups of 64", {"format": "e2m3", "group_size": 64}),
]
BATCH, WINDOW, WINDOWS = 8, 512, 32


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def show_quality(model: CodeLM) -> None:
    """Held-out bits per byte of the float model, and of a copy that `quantize_` has packed for each setting."""
    windows = held_out_windows(load_split().held_out, length=WINDOW, kib_per_file=2)
    windows = windows[: min(len(windows) // BATCH * BATCH, WINDOWS)]
    weights = sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "lm_head" in name)
    _title(f"Held-out bits per byte ({windows.numel() / 1e3:.0f} kB of source that it was not trained on)")
    print(f"{'':<20} {'bits per weight':>15} {'weights':>13} {'bits per byte':>14} {'loss':>9}")
    baseline = bits_per_byte(model, windows, batch_size=BATCH)
    print(f"{'FP16':<20} {16:>15} {2 * weights / 1e6:>10.2f} MB {baseline:>14.4f}", flush=True)
    for label, options in SETTINGS:
        packed = copy.deepcopy(model)
        report = fp6_compile.quantize_(packed, **options)
        bits = bits_per_byte(packed, windows, batch_size=BATCH)
        size, loss = report.bytes_after, round(bits - baseline, 4) + 0.0  # + 0.0: no minus before a zero
        print(f"{label:<20} {8 * size / weights:>15.2f} {size / 1e6:>10.2f} MB {bits:>14.4f} {loss:>+9.4f}", flush=True)


def show_report(report: Report | None) -> None:
    """What the backend did with each linear."""
    _title('What torch.compile(model, backend="fp6") quantized')
    print(_shortened(str(report)))


def _shortened(report: str, layers: int = 1) -> str:
    """The report without the layers that are like the first."""
    lines = report.splitlines()
    kept = [line for line in lines if "layers." not in line or any(f"layers.{i}." in line for i in range(layers))]
    first = next(i for i, line in enumerate(kept) if "layers." in line)
    rest = len(lines) - len(kept)
    end = first + sum("layers." in line for line in kept)
    return "\n".join([*kept[:end], f"  ... and {rest} more in the other layers", *kept[end:]])


def show_text(model: CodeLM, step: Callable[..., Tensor]) -> None:
    """A continuation of a prompt through the static cache, one compiled step a byte."""
    _title('What it writes (one compiled decode step, backend="fp6", temperature 0.5)')
    print(PROMPT.decode(), end="", flush=True)
    for byte in stream(model, PROMPT, 300, temperature=0.5, seed=3, step=step):
        print(bytes([byte]).decode("latin-1"), end="", flush=True)
    print()


@torch.inference_mode()
def _steps(model: CodeLM, step: Callable[..., Tensor], count: int) -> Iterator[float]:
    """Milliseconds of each of `count` decode steps."""
    cache = KVCache.allocate(model.config, 1, 512, dtype=DTYPE, device=DEVICE)
    token, position = (
        torch.zeros(1, 1, dtype=torch.int64, device=DEVICE),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
    )
    for _ in range(count):
        started = time.perf_counter()
        step(token, cache, position)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        yield 1e3 * (time.perf_counter() - started)
        position = position + 1


def show_speed(model: CodeLM, steps: dict[str, Callable[..., Tensor]]) -> None:
    """Milliseconds a token, the backends taking turns so that a noisy machine is noisy for both."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    _title(f"Milliseconds per token, batch 1 ({name})")
    times: dict[str, list[float]] = {label: [] for label in steps}
    for label, step in steps.items():
        print(f"compiling the decode step with {label} ...", flush=True)
        list(_steps(model, step, 3))
    for _ in range(5):
        for label, step in steps.items():
            times[label] += _steps(model, step, 40)
    for label, values in times.items():
        p90 = statistics.quantiles(values, n=10)[-1]
        print(f"{label:<24} {statistics.median(values):8.2f} ms (median)   {p90:8.2f} ms (90th percentile)")
    if DEVICE == "cpu":
        print(
            "All weights of this small model fit in the cache; six bits save time where they come from memory (README)."
        )


def main() -> None:
    """Run all parts in turn."""
    config, provenance = read_metadata()
    model = load_pretrained(dtype=DTYPE, device=DEVICE)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"code_lm: {parameters / 1e6:.2f} M parameters, {config.layers} layers, trained for {provenance['steps']} steps"
    )
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {DEVICE}, {DTYPE}")
    show_quality(model)
    fp6 = torch.compile(model, backend="fp6", fullgraph=True, options={"format": "e2m3"})
    inductor = torch.compile(model, backend="inductor", fullgraph=True)
    show_speed(model, {'backend="inductor"': inductor, 'backend="fp6"': fp6})
    show_report(fp6_compile.last_report())
    show_text(model, fp6)


if __name__ == "__main__":
    main()
