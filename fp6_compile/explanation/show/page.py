"""A result as one HTML page: no script, no other file, no network; light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from fp6_compile.explanation.result import Linear, Result
from fp6_compile.explanation.show import text
from fp6_compile.report import size_text

# The SQNR of a full bar: more than a format of six bits reaches.
_MOST_DB = 40.0


def page(found: Result, whole: bool = True) -> str:
    """A whole page or, for notebooks, what is in its body."""
    style = Path(__file__).with_name("page.css").read_text()
    parts = [_head(found), _cards(found), _breaks(found), _table(found)]
    body = f'<style>{style}</style><div class="fp6">{"".join(parts)}</div>'
    if not whole:
        return body
    title = escape(f"{found.model} in six bits on {found.device}")
    about = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><head>{about}<title>{title}</title></head><body>{body}</body></html>\n'


def _head(found: Result) -> str:
    where = f"backend fp6 ({escape(found.options)}), on {escape(found.device)}; nothing was run"
    return f"<h1>{escape(found.model)}</h1><p class=sub>{where}</p>"


def _cards(found: Result) -> str:
    read, guess = found.traffic, found.prediction
    about_time = f"{'<br>'.join(escape(part(found)) for part in (text.times, text.formula, text.sources))}"
    before, after = (sum(getattr(x, key) for x in found.linears) for key in ("bytes_before", "bytes_after"))
    known = sorted(x.sqnr for x in found.quantized if x.sqnr is not None)
    error = ("unknown", "weights without values") if not known else (f"{known[0]:.1f} dB", "SQNR of the worst linear")
    predicted = "unknown" if guess.ms is None else text.time_text(guess.ms)
    kinds = escape(text.kernels(found).partition(": ")[2] + (f" ({found.note})" if found.note else ""))
    cards: list[tuple[str, ...]] = [
        (
            "linears",
            f"{len(found.quantized)} of {len(found.linears)}",
            f"quantized, {size_text(before)} &rarr; {size_text(after)}",
        ),
        ("error", *error),
        ("graphs", str(found.graphs), text.breaks(found)),
        ("CUDA graphs", *map(escape, text.cuda_graphs(found))),
        ("kernels a call", str(len(found.launches)) if found.launches is not None else "unknown", kinds),
        ("read a call", size_text(read.total), escape(text.reads(found))),
        ("time a call <b>predicted, not measured</b>", predicted, about_time),
    ]
    return f"<div class=cards>{''.join(map(_card, cards))}</div>"


def _card(card: tuple[str, ...]) -> str:
    name, value, more = card
    return f"<section><h2>{name}</h2><p class=big>{value}</p><p>{more}</p></section>"


def _breaks(found: Result) -> str:
    lines = [
        f"<li><code>{escape(stop.file)}:{stop.line}</code> <code>{escape(stop.source)}</code><br>{escape(stop.reason)}"
        for stop in found.breaks
    ]
    stopped = f"<p class=skipped>Tracing stopped: {escape(found.stopped)}</p>" if found.stopped else ""
    return (f"<h2>Graph breaks</h2><ol>{''.join(lines)}</ol>" if lines else "") + stopped


def _table(found: Result) -> str:
    most = max((linear.bytes_before for linear in found.linears), default=1)
    head = "".join(f"<th>{name}" for name in ("", "linear", "shape", "format", "bytes", "SQNR", ""))
    rows = "".join(_row(linear, most) for linear in found.linears)
    return f"<div class=wide><table><thead><tr>{head}</thead><tbody>{rows}</tbody></table></div>"


def _row(linear: Linear, most: int) -> str:
    mark, name, shape, kind, size, noise, why = map(escape, text.cells(linear))
    size = size.replace("-&gt;", "&rarr;")
    filled = min(1.0, max(0.0, (linear.sqnr or 0.0) / _MOST_DB))
    cells: Iterable[str] = (
        f"<b>{mark}</b>",
        f"<code>{name}</code>",
        shape,
        kind,
        f"{size}{_bar(linear.bytes_before / most, linear.bytes_after / most)}",
        f"{noise}{_bar(1, filled)}" if linear.quantized and linear.sqnr is not None else noise,
        why,
    )
    return f"<tr class={'quantized' if linear.quantized else 'skipped'}>{''.join(_cells(cells))}"


def _cells(cells: Iterable[str]) -> Iterator[str]:
    return (f"<td>{cell}" for cell in cells)


def _bar(whole: float, part: float) -> str:
    """A bar of `whole` of the column's width, dark up to `part`."""
    return f'<i class=bar style="width:{100 * whole:.1f}%"><i style="width:{100 * part / (whole or 1):.1f}%"></i></i>'
