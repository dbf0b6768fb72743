"""Measure the rows of one subject, those that are not measured yet."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from benchmarks.accuracy.compress import compressed
from benchmarks.accuracy.report import COLUMNS
from benchmarks.accuracy.rows import Row, Rows
from benchmarks.accuracy.settings import Setting
from benchmarks.accuracy.subjects.base import Subject


def run(subject: Subject, settings: Sequence[Setting], rows: Rows) -> None:
    """Measure `settings` on `subject`, printing each row as it is done; rows that are there are not measured again."""
    left = [setting for setting in settings if not rows.has(subject.name, subject.size, setting.label)]
    print(f"\n{subject.name}: {len(left)} of {len(settings)} rows to measure", flush=True)
    if not left:
        return
    subject.reference()
    for number, setting in enumerate(left, 1):
        started = time.perf_counter()
        row = measure(subject, setting)
        row["seconds"] = round(time.perf_counter() - started, 1)
        rows.add(row)
        columns = [(title, form.format(row[key])) for key, title, form in COLUMNS[subject.loss] if key in row]
        shown = ", ".join(map(" ".join, columns))
        print(
            f"[{number}/{len(left)}] {setting.label:<32} {row['bits']:5.2f} bits  {shown}  ({row['seconds']} s)",
            flush=True,
        )


def measure(subject: Subject, setting: Setting) -> Row:
    """One row: sizes, errors and figures of `subject` under `setting`. The subject is then as it was."""
    inputs = subject.calibration(setting.calibration) if setting.calibration else ()
    sensitivity = subject.sensitivity if setting.calibration and setting.target_bits else None
    with compressed(subject.model, subject.linears(), setting, inputs, sensitivity) as books:
        bits, error = books.stored_bits / books.weights, books.sqnr
        figures, losses, weights = subject.measure()
    # The mean noise over layers, as a share of the signal.
    noise = sum(10 ** (-value / 10) for value in error.values()) / max(len(error), 1)
    return {
        "subject": subject.name,
        "size": subject.size,
        "label": setting.label,
        **vars(setting),
        "bits": round(bits, 4),
        "loss": subject.loss,
        **{name: float(f"{value:.6g}") for name, value in figures.items()},
        "sqnr": round(-10 * math.log10(noise), 2) if noise else None,
        "layers": error,
        "losses": [float(f"{value:.4g}") for value in losses.tolist()],
        "weights": weights.tolist(),
    }
