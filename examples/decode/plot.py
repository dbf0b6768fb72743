"""A picture of where the time of a token goes: `python -m examples.decode.plot RESULT.json PICTURE.png`. Needs matplotlib.

A bar for each provider and batch size, of milliseconds per token: the matmuls by what they are for, attention, the rest, and
on a GPU the time between kernels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from examples.decode.breakdown import ATTENTION, GAPS, REST

COLOURS = ["#1d3557", "#457b9d", "#2a9d8f", "#8ab17d", "#e9c46a", "#b5838d", "#6d597a", "#355070"]
LAST = {ATTENTION: "#e76f51", REST: "#adb5bd", GAPS: "#e9ecef"}


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the picture of a document of examples.decode_latency to `path`. Raises ValueError without breakdowns."""
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
