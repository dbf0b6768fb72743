"""The study as a table, losses beside that of per-channel E3M2 rounded to nearest, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.accuracy.rows import Row
from benchmarks.accuracy.subjects.metrics import bootstrap

# Per main loss: (column, title, format) of what is shown beside it.
COLUMNS = {
    "kl": [
        ("kl", "KL, bits", "{:.2e}"),
        ("bits_per_byte", "bits/byte", "{:.4f}"),
        ("top1", "top 1", "{:.3f}"),
        ("greedy", "greedy", "{:.2f}"),
        ("parses", "parses", "{:.2f}"),
    ],
    "cosine": [
        ("cosine", "1 - cosine", "{:.2e}"),
        ("spearman", "Spearman", "{:.4f}"),
        ("kendall", "Kendall", "{:.4f}"),
    ],
}
BASELINE = "e3m2 channel rtn"
# Of the picture.
COLORS = {"e3m2": "#d1495b", "e2m3": "#00798c", "auto": "#edae49", "int4": "#30343f", "int8": "#9a6fb0"}
MARKERS = {"rtn": "o", "mse": "s", "weighted": "^", "gptq": "D", "gptq-rtn": "d", "lorc": "P", "lorc-gptq": "X"}
MARKERS |= {"rounding": "<", "bias": ">", "pow2": "2", "nupes": "*"}
TITLES = {"kl": "KL divergence to FP16, bits per token", "cosine": "1 - cosine to FP32's embeddings"}
LAYERS = ("e3m2 channel rtn", "e2m3 channel rtn", "e2m3 g64 rtn", "int4 channel rtn")


def ratio(row: Row, baseline: Row) -> tuple[float, float]:
    """The loss of `row` over that of `baseline`, and its standard error, over the same documents or sentences."""
    weights = torch.tensor(row["weights"])
    losses = torch.stack([torch.tensor(row["losses"]), torch.tensor(baseline["losses"])], 1)
    mean = (losses * weights[:, None]).sum(0)
    draws = bootstrap(losses, weights)
    return float(mean[0] / mean[1]), float((draws[:, 0] / draws[:, 1]).std())


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows of one subject, with `ratio` and `ratio_error` to the baseline, if that is among them."""
    baseline = next((row for row in rows if row["label"] == BASELINE), None)
    if baseline is None:
        return rows
    return [
        {**row, **dict(zip(("ratio", "ratio_error"), (round(x, 4) for x in ratio(row, baseline)), strict=True))}
        for row in rows
    ]


def table(rows: list[Row], style: str = "plain") -> str:
    """The table of one subject's rows, with their ratios, in a style of tabulate ("pipe" is Markdown)."""
    columns = COLUMNS[rows[0]["loss"]]
    head = ["weights", "bits", *(title for _, title, _ in columns), "loss / E3M2 RTN", "SQNR, dB"]
    cells = []
    for row in rows:
        shown = [form.format(row[key]) if key in row else "" for key, _, form in columns]
        share = f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}" if "ratio" in row else ""
        cells.append([row["label"], f"{row['bits']:.2f}", *shown, share, f"{row['sqnr']:.1f}" if row["sqnr"] else ""])
    return tabulate(cells, head, tablefmt=style, disable_numparse=True)


def draw(subjects: dict[str, list[Row]], target: Path) -> None:
    """A row of two panels per subject, written to `target`; not of those that only compare calibrations."""
    subjects = {name: rows for name, rows in subjects.items() if any(row["format"] == "auto" for row in rows)}
    if not subjects:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5 * len(subjects)))
    axes = figure.subplots(len(subjects), 2, squeeze=False)
    for (name, rows), (quality, layers) in zip(subjects.items(), axes, strict=True):
        _quality(quality, [row for row in rows if row["format"] != "fp16"])
        _layers(layers, rows)
        quality.set_title(name, fontsize=10)
    about = next(iter(subjects.values()))[-1]
    what = f"torch {about.get('torch')}, Python {about.get('python')}, {about.get('date')}"
    figure.suptitle(what, fontsize=9, color="#555555")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


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
