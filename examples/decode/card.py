"""What was measured, for people and as one line of JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def summary(known: Result, seconds: list[float], prefill: list[float], batch: int, bandwidth: float | None) -> Result:
    """`known` and the figures that follow from the times of steps and prefills.

    GB/s counts the bytes that a token needs: the weights, of the embedding a row, and the whole static cache of keys and
    values. `bandwidth`: GB/s that the machine was seen to read at, if known.
    """
    p50, p90 = statistics.median(seconds), statistics.quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]
    nbytes = known["read_bytes"] + known["kv_cache_bytes"]
    rate = nbytes / p50 / 1e9
    return {
        **known,
        "ms_p50": round(p50 * 1e3, 3),
        "ms_p90": round(p90 * 1e3, 3),
        "tokens_per_s": round(batch / p50, 2),
        "bytes_per_step": nbytes,
        "gb_s": round(rate, 2),
        "share_of_bandwidth": bandwidth and round(rate / bandwidth, 2),
        "prefill_ms": round(statistics.median(prefill) * 1e3, 2),
    }


# label, key, what it is divided by, format
LINES = [
    ("ms per token, median", "ms_p50", 1, "{:.2f}"),
    ("ms per token, 90th percentile", "ms_p90", 1, "{:.2f}"),
    ("tokens per second", "tokens_per_s", 1, "{:.1f}"),
    ("bytes a step needs, MB", "bytes_per_step", 1e6, "{:.0f}"),
    ("GB/s of them", "gb_s", 1, "{:.1f}"),
    ("share of the bandwidth", "share_of_bandwidth", 1, "{:.0%}"),
    ("prefill, ms", "prefill_ms", 1, "{:.1f}"),
    ("kernels per token", "kernels", 1, "{:.0f}"),
    ("weights, MB", "weight_bytes", 1e6, "{:.0f}"),
    ("memory, MB", "resident_bytes", 1e6, "{:.0f}"),
    ("peak memory, MB", "peak_bytes", 1e6, "{:.0f}"),
    ("compilation, s, empty caches", "compile_cold_s", 1, "{:.1f}"),
    ("compilation, s, second process", "compile_warm_s", 1, "{:.1f}"),
    ("swap an adapter, ms", "swap_ms", 1, "{:.1f}"),
    ("fuse an adapter, ms", "fuse_ms", 1, "{:.1f}"),
]


def show(title: str, results: dict[str, Result]) -> None:
    """A column for each provider; a line for what any of them has."""
    print(f"\n{title}\n{'-' * len(title)}")
    for provider, result in results.items():
        if "error" in result:
            print(f"{provider}: not measured: {result['error']}")
    ran = {provider: result for provider, result in results.items() if "error" not in result}
    print(f"{'':<32}" + "".join(f"{provider:>12}" for provider in ran))
    for label, key, unit, form in LINES:
        values = [result.get(key) for result in ran.values()]
        if any(value is not None for value in values):
            cells = [form.format(value / unit) if value is not None else "-" for value in values]
            print(f"{label:<32}" + "".join(f"{cell:>12}" for cell in cells))
    if {"fp6", "inductor"} <= ran.keys():
        print(f"fp6: {ran['inductor']['ms_p50'] / ran['fp6']['ms_p50']:.2f}x the speed of inductor in 16 bits")


def write(document: dict[str, Any], path: Path | None) -> None:
    """The document as one line, into `path` if there is one: whole after every batch size, whatever stops the run."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document) + "\n")
