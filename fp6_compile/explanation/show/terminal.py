"""A result for rich: `rich.print(explanation)`."""

from __future__ import annotations

from typing import Any

from fp6_compile.explanation.result import Result
from fp6_compile.explanation.show import text


def renderable(found: Result) -> Any:
    """What rich prints. Only rich calls this, so it is installed."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in text.summary(found):
        facts.add_row(Text(name), Text(value))
    table = Table(box=None, header_style="dim", padding=(0, 1))
    for head, justify in zip(text.HEAD, text.JUSTIFY, strict=True):
        table.add_column(head, justify=justify, overflow="fold")
    for linear in found.linears:
        table.add_row(*map(Text, text.cells(linear)), style=None if linear.quantized else "yellow")
    return Group(Text(text.title(found), style="bold cyan"), Text(), facts, Text(), table)
