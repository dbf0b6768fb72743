"""What was measured, for people and as one line of JSON."""

from __future__ import annotations

import json
import statistics
from typing import Any


def summary(known: dict[str, Any], seconds: list[float], batch: int, bandwidth: float | None) -> dict[str, Any]:
    """`known` and the figures that follow from the steps' times. GB/s counts the weights that a token reads.

    `bandwidth`: GB/s that the machine was seen to read at, if known.
    """
    p50, p90 = statistics.median(seconds), statistics.quantiles(seconds, n=10)[-1]
    rate = known["read_bytes"] / p50 / 1e9
    share = bandwidth and round(rate / bandwidth, 2)
    return {
        **known,
        "ms_p50": round(p50 * 1e3, 3),
        "ms_p90": round(p90 * 1e3, 3),
        "tokens_per_s": round(batch / p50, 2),
        "gb_s": round(rate, 2),
        "share_of_read": share,
    }


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    """A column per backend."""
    print(f"\n{title}\n{'-' * len(title)}")
    lines = [
        ("ms per token, median", "ms_p50", 1, "{:.2f}"),
        ("ms per token, 90th percentile", "ms_p90", 1, "{:.2f}"),
        ("tokens per second", "tokens_per_s", 1, "{:.1f}"),
        ("weights, MB", "weight_bytes", 1e6, "{:.0f}"),
        ("resident memory, MB", "resident_bytes", 1e6, "{:.0f}"),
        ("compilation, s", "compile_s", 1, "{:.1f}"),
        ("weights read, GB/s", "gb_s", 1, "{:.1f}"),
        ("share of the read bandwidth", "share_of_read", 1, "{:.0%}"),
    ]
    print(f"{'':<32}" + "".join(f"{backend:>12}" for backend in results))
    for label, key, unit, form in lines:
        cells = [form.format(r[key] / unit) if r[key] is not None else "-" for r in results.values()]
        print(f"{label:<32}" + "".join(f"{cell:>12}" for cell in cells))


def compare(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of fp6 to inductor, where both ran."""
    if not {"fp6", "inductor"} <= results.keys():
        return {}
    ours, theirs = results["fp6"], results["inductor"]
    ratios = {
        "speed_up": round(theirs["ms_p50"] / ours["ms_p50"], 3),
        "weight_memory": round(ours["weight_bytes"] / theirs["weight_bytes"], 3),
    }
    print(f"\nfp6: {ratios['speed_up']:.2f}x the speed, {ratios['weight_memory']:.0%} of the weight memory")
    return ratios


def last_line(document: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(document))
