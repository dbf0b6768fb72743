"""The study as pictures: loss against bits per weight, and the error of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.accuracy.rows import Row

COLORS = {"e3m2": "#d1495b", "e2m3": "#00798c", "auto": "#edae49", "int4": "#30343f", "int8": "#9a6fb0"}
MARKERS = {"rtn": "o", "mse": "s", "weighted": "^", "gptq": "D", "gptq-rtn": "d", "lorc": "P", "lorc-gptq": "X"}
MARKERS |= {"rounding": "<", "bias": ">", "pow2": "2", "nupes": "*"}
TITLES = {"kl": "KL divergence to FP16, bits per token", "cosine": "1 - cosine to FP32's embeddings"}
LAYERS = ("e3m2 channel rtn", "e2m3 channel rtn", "e2m3 g64 rtn", "int4 channel rtn")


def draw(subjects: dict[str, list[Row]], target: Path) -> None:
    """A row of two panels per subject, written to `target`; not of those that only compare calibrations."""
    subjects = {name: rows for name, rows in subjects.items() if any(row["format"] == "auto" for row in rows)}
    if not subjects:
        return
    figure, axes = plt.subplots(len(subjects), 2, figsize=(12, 4.5 * len(subjects)), squeeze=False)
    for (name, rows), (quality, layers) in zip(subjects.items(), axes, strict=True):
        _quality(quality, [row for row in rows if row["format"] != "fp16"])
        _layers(layers, rows)
        quality.set_title(name, fontsize=10)
    about = next(iter(subjects.values()))[-1]
    what = f"torch {about.get('torch')}, Python {about.get('python')}, {about.get('date')}"
    figure.suptitle(what, fontsize=9, color="#555555")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _quality(panel: Any, rows: list[Row]) -> None:
    for row in (row for row in rows if row["calibration"] in (None, "own")):
        style = {"color": COLORS.get(row["format"], "#66a182"), "marker": MARKERS.get(row["algorithm"], "v")}
        panel.scatter(row["bits"], row[row["loss"]], s=28, alpha=0.8, **style)
    named = {name: COLORS.get(name, "#66a182") for name in dict.fromkeys(row["format"] for row in rows)}
    for name, color in named.items():
        if name in COLORS:
            panel.scatter([], [], color=color, label=name)
    panel.scatter([], [], color="#66a182", label="other formats")
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        panel.scatter([], [], color="#555555", marker=MARKERS.get(name, "v"), label=name)
    panel.set_yscale("log")
    panel.set_xlabel("bits per weight, scales counted")
    panel.set_ylabel(TITLES[rows[0]["loss"]] if rows else "")
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panel.spines[["top", "right"]].set_visible(False)


def _layers(panel: Any, rows: list[Row]) -> None:
    for row in rows:
        if row["label"] in LAYERS:
            style = {"linestyle": "--" if row["group"] else "-", "color": COLORS[row["format"]]}
            panel.plot(list(row["layers"].values()), marker=".", linewidth=0.8, label=row["label"], **style)
    panel.set_xlabel("linear, in the order of the model")
    panel.set_ylabel("SQNR of the weight, dB")
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
