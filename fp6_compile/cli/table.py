"""Rows of text in columns."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows, of which the first are headings: the first column to the left, the others to the right.

    Raises ImportError where tabulate is not installed.
    """
    from tabulate import tabulate

    align = ["left", *["right"] * (len(rows[0]) - 1)]
    print(tabulate(rows, "firstrow", tablefmt="plain", disable_numparse=True, colalign=align))
