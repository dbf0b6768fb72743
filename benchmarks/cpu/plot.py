"""A picture of a JSON file of `benchmarks.cpu`: `python -m benchmarks.cpu.plot benchmarks/results/cpu_2_threads.json`.

One panel per weight: how many times as fast as F.linear in BF16 each way to multiply is, by number of activations. The PNG
lies beside the JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOP = 4.0  # of the vertical axis; what is above is written there
COLORS = {"fp6": "#d1495b", "int8": "#00798c", "int4": "#8d96a3"}


def main() -> None:
    """Draw every file that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        draw(json.loads(file.read_text()), file.with_suffix(".png"))


def draw(document: dict[str, Any], target: Path) -> None:
    """Write the picture of a document to `target`."""
    rows = [row for row in document["rows"] if row["provider"].endswith("bf16")]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.2 * len(shapes), 3.2), sharey=True, squeeze=False)
    for panel, (n, k) in zip(axes[0], shapes, strict=True):
        _panel(panel, [row for row in rows if (row["n"], row["k"]) == (n, k)])
        panel.set_title(f"{n} x {k}", fontsize=10)
    axes[0][0].set_ylabel("times as fast as F.linear, BF16")
    axes[0][0].legend(frameon=False, fontsize=8)
    about = f"{document['cpu']}, {document['threads']} thread(s), {document['date']}, torch {document['torch']}"
    figure.suptitle(about, fontsize=9, color="#555555")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def _panel(panel: Any, rows: list[dict[str, Any]]) -> None:
    linear = {row["m"]: row["ms_p50"] for row in rows if row["provider"].startswith("linear")}
    above: list[tuple[str, str]] = []
    for name in dict.fromkeys(row["provider"] for row in rows if not row["provider"].startswith("linear")):
        points = [(row["m"], linear[row["m"]] / row["ms_p50"]) for row in rows if row["provider"] == name]
        label = name.removesuffix(" bf16")
        color = COLORS[label.split()[0]]
        panel.plot(*zip(*points, strict=True), "o-", markersize=3, label=label, color=color)
        above += [(f"{label}: {ratio:.1f} at M = {m}", color) for m, ratio in points if ratio > TOP]
    for line, (text, color) in enumerate(above):
        panel.annotate(text, (0.25, 0.94 - 0.08 * line), xycoords="axes fraction", color=color, fontsize=7)
    panel.axhline(1, color="#555555", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted(linear), [str(m) for m in sorted(linear)], fontsize=7)
    panel.minorticks_off()
    panel.set_ylim(0, TOP)
    panel.set_xlabel("activations, M")
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
