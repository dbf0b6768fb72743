"""A result as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from fp6_compile.explanation.result import Linear, Result
from fp6_compile.report import size_text

HEAD = ("", "linear", "shape", "format", "bytes", "SQNR", "")
JUSTIFY: tuple[Literal["left", "right"], ...] = ("left", "left", "right", "left", "right", "right", "left")


def text(found: Result) -> str:
    """The facts, and a table with a line for each linear."""
    facts = "\n".join(f"{name:<12}  {value}" for name, value in summary(found))
    return f"{title(found)}\n\n{facts}\n\n{_table(found.linears)}"


def title(found: Result) -> str:
    """What was explained."""
    return f"{found.model}, backend fp6 ({found.options}), on {found.device}: nothing was run"


def summary(found: Result) -> Iterator[tuple[str, str]]:
    """The facts above the table: (name, sentence)."""
    before, after = (sum(getattr(x, key) for x in found.linears) for key in ("bytes_before", "bytes_after"))
    yield (
        "linears",
        f"{len(found.quantized)} of {len(found.linears)} quantized, {size_text(before)} -> {size_text(after)}",
    )
    yield "graphs", f"{found.graphs}, {breaks(found)}"
    for stop in found.breaks:
        yield "", f"{stop.file}:{stop.line}: {stop.source}"
        yield "", f"    {stop.reason}"
    if found.stopped:
        yield "stopped", f"tracing needs a value to go on, and what follows is missing here: {found.stopped}"
    yield "CUDA graphs", ": ".join(cuda_graphs(found))
    yield "kernels", kernels(found)
    if found.note:
        yield "", found.note
    yield "reads", f"{size_text(found.traffic.total)} a call: {reads(found)}"
    yield "time", f"{times(found)} (predicted, not measured)"
    yield "", formula(found)
    yield "", sources(found)


def breaks(found: Result) -> str:
    """How many graph breaks."""
    return {0: "no graph breaks", 1: "1 graph break"}.get(len(found.breaks), f"{len(found.breaks)} graph breaks")


def cuda_graphs(found: Result) -> tuple[str, str]:
    """(whether CUDA graphs record the call, why or why not)."""
    graphs = found.cuda_graphs
    if graphs.hold:
        return ("hold", "all of the call") if graphs.asked else ("would hold", 'mode="reduce-overhead" asks for them')
    return "unknown" if graphs.hold is None else "do not hold", "; ".join(graphs.reasons)


def kernels(found: Result) -> str:
    """How many kernels a call launches, by kind."""
    if found.launches is None:
        return f"unknown: {found.unknown}"
    kinds = sorted(found.kinds.items())
    return f"{len(found.launches)} a call: {', '.join(f'{count} {kind}' for kind, count in kinds)}"


def reads(found: Result) -> str:
    """What the bytes are that a call reads."""
    read = found.traffic
    parts = {"packed weights": read.packed, "other weights": read.others, "inputs and KV cache": read.inputs}
    return ", ".join(f"{size_text(count)} {name}" for name, count in parts.items())


def times(found: Result) -> str:
    """Predicted milliseconds."""
    guess = found.prediction
    if guess.ms is None or guess.ms_16bit is None:
        return f"unknown: {guess.source}"
    ratio = guess.ms_16bit / guess.ms
    return f"{time_text(guess.ms)} a call; with 16-bit weights {time_text(guess.ms_16bit)}, {ratio:.2f}x"


def time_text(ms: float) -> str:
    """Milliseconds as text, in ms or us."""
    return f"{ms:.3g} ms" if ms >= 0.1 else f"{1e3 * ms:.3g} us"


def formula(found: Result) -> str:
    """How the predicted time is computed."""
    guess = found.prediction
    rate = "an unknown bandwidth" if guess.gb_per_s is None else f"{guess.gb_per_s:.4g} GB/s"
    launches = f" + {len(found.launches)} launches of {guess.launch_us:g} us {guess.launched}" if found.launches else ""
    return f"= bytes read / ({guess.share:g} of {rate}){launches}"


def sources(found: Result) -> str:
    """Where the prediction's numbers are from."""
    return f"assumed: share, launch, and that arithmetic is free; bandwidth: {found.prediction.source}"


def cells(linear: Linear) -> tuple[str, ...]:
    """A line of the table, under HEAD."""
    size = size_text(linear.bytes_before)
    if linear.quantized:
        size += f" -> {size_text(linear.bytes_after)}"
    shape, remark = "x".join(map(str, linear.shape)), linear.reason or linear.note or ""
    mark = "fp6" if linear.quantized else "skip"
    return mark, linear.name, shape, linear.format or linear.dtype, size, linear.sqnr_text, remark


def _table(linears: Sequence[Linear]) -> str:
    lines = [HEAD, *map(cells, linears)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    adjust = {"left": str.ljust, "right": str.rjust}
    return "\n".join(
        "  ".join(adjust[side](cell, w) for cell, w, side in zip(line, widths, JUSTIFY, strict=True)).rstrip()
        for line in lines
    )
