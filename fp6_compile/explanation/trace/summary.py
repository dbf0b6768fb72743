"""What was seen while tracing, as a Result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fp6_compile.explanation.result import (
    MICROSECONDS_PER_LAUNCH,
    SHARE_OF_BANDWIDTH,
    Break,
    CudaGraphs,
    Linear,
    Prediction,
    Result,
)
from fp6_compile.explanation.trace.backend import Found, Trace
from fp6_compile.fake_gpu.devices import Device


def result(name: str, about: Device, trace: Trace, breaks: Sequence[Any], stopped: str | None) -> Result:
    """The result for the model `name` on the device `about`; `breaks` are Dynamo's GraphCompileReasons."""
    step, options = trace.step, trace.options
    unknown = trace.unknown or (step.failures[0] if step.failures else None)
    linears = tuple(_linear(found) for found in trace.found.values())
    graphs = _cuda_graphs(about, trace, bool(breaks), unknown)
    launches = None if unknown else tuple(step.launches)
    return Result(
        model=name,
        device=about.name,
        options=options.describe(),
        linears=linears,
        graphs=step.graphs,
        breaks=_breaks(breaks),
        cuda_graphs=graphs,
        launches=launches,
        traffic=step.traffic,
        prediction=_prediction(about, step.traffic.total, linears, len(launches or ()), graphs),
        unknown=unknown,
        stopped=stopped,
        note="counted in code for an H200: for this device none can be generated here" if is_stand_in(about) else None,
    )


def is_stand_in(about: Device) -> bool:
    """Whether an H200 stands in for a device, a GPU for which no code can be generated."""
    return about.arch is not None and not about.is_cuda


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _linear(found: Found) -> Linear:
    line = found.line
    names = [name.removesuffix(".weight") for name in found.names]
    name = next((name for name in names if name.endswith(line.name)), names[0])
    dtype, how = str(line.dtype).removeprefix("torch."), (found.format, line.bytes_before, line.bytes_after, found.sqnr)
    module, note = name.rpartition(".")[0], line.note
    if module and note:
        note = note.replace(f"{module}.", "")  # of the linears that it is merged with
    return Linear(name, line.shape, dtype, *how, line.reason, note)


def _breaks(reasons: Sequence[Any]) -> tuple[Break, ...]:
    """One for each line, with the first of its reasons."""
    found: dict[tuple[str, int], Break] = {}
    for reason in reasons:
        stop = _break(reason)
        found.setdefault((stop.file, stop.line), stop)
    return tuple(found.values())


def _break(reason: Any) -> Break:
    frame, text = reason.user_stack[-1], str(reason.reason)
    explanation = next((part.split("Explanation:")[1] for part in text.splitlines() if "Explanation:" in part), "")
    why = ": ".join(part.strip() for part in (first_line(text), explanation) if part.strip())
    return Break(frame.filename, frame.lineno or 0, (frame.line or "").strip(), why)


def _cuda_graphs(about: Device, trace: Trace, broken: bool, unknown: str | None) -> CudaGraphs:
    """Inductor's own verdict, of every graph."""
    asked = trace.asks_for_cuda_graphs
    if about.arch is None:
        return CudaGraphs(False, asked, ("a CPU has none",))
    if unknown:
        return CudaGraphs(None, asked, (unknown,))
    reasons = [*trace.step.obstacles, *(f"outside the recording: {node}" for node in trace.step.partitions)]
    if broken:
        reasons.append(f"graph breaks: {trace.step.graphs} graphs, and Python between them")
    return CudaGraphs(not reasons, asked, tuple(dict.fromkeys(map(_reason, reasons))))


def _reason(text: str) -> str:
    """Inductor's words in one line, with the file and line that it names."""
    what = first_line(text).removeprefix("skipping cudagraphs due to ").partition(" Found from")[0].rstrip(".")
    lines = re.findall(r'File "(.+?)", line (\d+)', text)
    return f"{what} ({':'.join(lines[-1])})" if lines else what


def _prediction(about: Device, read: int, linears: Sequence[Linear], launches: int, graphs: CudaGraphs) -> Prediction:
    launched = (
        "on a CPU" if about.arch is None else "in a CUDA graph" if graphs.hold and graphs.asked else "from the host"
    )
    launch_us, saved = MICROSECONDS_PER_LAUNCH[launched], sum(x.bytes_before - x.bytes_after for x in linears)

    def milliseconds(count: int) -> float | None:
        if about.gb_per_s is None:
            return None
        return count / (about.gb_per_s * SHARE_OF_BANDWIDTH) / 1e6 + launches * launch_us / 1e3

    times = milliseconds(read), milliseconds(read + saved)
    return Prediction(*times, about.gb_per_s, SHARE_OF_BANDWIDTH, launch_us, launched, about.source)
