"""Results as a table, as one line of JSON, and as a picture of where the time of a token goes.

`python -m benchmarks.decode.report RESULT.json PICTURE.png` draws the picture, which needs matplotlib. It has a bar of
milliseconds per token for each provider and batch size: the matmuls by what they are for, attention, the rest, and on a GPU
the time between kernels.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.decode.breakdown import ATTENTION, GAPS, REST

Result = dict[str, Any]


def summary(known: Result, seconds: list[float], prefill: list[float], batch: int, bandwidth: float | None) -> Result:
    """`known` and the figures that are computed from the times of steps and prefills.

    GB/s counts the bytes that a token needs: the weights, of the embedding a row, and the whole static cache of keys and
    values. `bandwidth`: GB/s at which the machine reads memory, if measured.
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

COLOURS = ["#1d3557", "#457b9d", "#2a9d8f", "#8ab17d", "#e9c46a", "#b5838d", "#6d597a", "#355070"]
LAST = {ATTENTION: "#e76f51", REST: "#adb5bd", GAPS: "#e9ecef"}


def show(title: str, results: dict[str, Result]) -> None:
    """A column for each provider; a line for each figure that any of them has."""
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
    """Write the document as one line into `path`, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document) + "\n")


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the picture of a document of benchmarks.decode to `path`. Raises ValueError without breakdowns."""
    from matplotlib.figure import Figure

    bars = [
        (f"{provider}, batch {batch}", result["breakdown"])
        for batch, results in document["results"].items()
        for provider, result in results.items()
        if result.get("breakdown")
    ]
    if not bars:
        raise ValueError("plot: the document has no breakdown of any provider; run with --plot")
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(bars)), layout="constrained")
    axis = figure.subplots()
    colours = _colours([parts for _, parts in bars])
    left = [0.0] * len(bars)
    for role, colour in colours.items():
        widths = [parts.get(role, 0.0) for _, parts in bars]
        axis.barh(range(len(bars)), widths, left=left, color=colour, label=role, height=0.68)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        label = f"{total:.0f}" if total >= 100 else f"{total:.3g}"
        axis.annotate(label, (total, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max(left))
    axis.set_xlabel("ms per token, profiled")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(_title(document), fontsize=10)
    figure.savefig(path, dpi=120)


def _colours(parts: list[dict[str, float]]) -> dict[str, str]:
    """By role, in the order of the bars: the linears first."""
    found = dict.fromkeys(role for bar in parts for role in bar)
    ours: list[str] = ["qkv", "o", "gate_up", "down", "head"]
    linears = [role for role in ours if role in found]
    linears += [role for role in found if role not in linears and role not in LAST]
    named = {role: COLOURS[i % len(COLOURS)] for i, role in enumerate(linears)}
    return {**named, **{role: colour for role, colour in LAST.items() if role in found}}


def _title(document: dict[str, Any]) -> str:
    where = document.get("device_name") or document["device"]
    return f"Where a token's time goes: {document['model']}, {where}\ntorch {document['torch']}, {document['date']}"


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
