"""The study as a table: a line per row, losses beside that of per-channel E3M2 rounded to nearest."""

from __future__ import annotations

import torch

from examples.accuracy.metrics import bootstrap
from examples.accuracy.rows import Row

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


def lines(rows: list[Row], markdown: bool = False) -> list[str]:
    """The table of one subject's rows, with their ratios."""
    columns = COLUMNS[rows[0]["loss"]]
    head = ["weights", "bits", *(title for _, title, _ in columns), "loss / E3M2 RTN", "SQNR, dB"]
    cells = [head]
    for row in rows:
        shown = [form.format(row[key]) if key in row else "" for key, _, form in columns]
        share = f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}" if "ratio" in row else ""
        cells.append([row["label"], f"{row['bits']:.2f}", *shown, share, f"{row['sqnr']:.1f}" if row["sqnr"] else ""])
    if markdown:
        return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *cells[1:])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
