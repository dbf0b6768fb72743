"""`explain`: what torch.compile(model, backend="fp6") makes of a call, for people, without running it and without its GPU.

fakes       the model and its inputs without values, on another device
isolation   Dynamo, used without leaving a trace in it
trace       graphs, linears, launches, graph breaks            <- lowerings/pretend.py, lowerings/capture.py
error       how much of a weight six bits lose
traffic     the bytes that a call reads
result      all that was found, as data
text, page, terminal    how it looks
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp6_compile.config import Options
from fp6_compile.explanation.result import (
    MICROSECONDS_PER_LAUNCH,
    SHARE_OF_BANDWIDTH,
    Break,
    CudaGraphs,
    Explanation,
    Linear,
    Prediction,
)
from fp6_compile.fake_gpu.devices import DEVICES, Device, device_named, this_device

__all__ = ["Break", "CudaGraphs", "Explanation", "Linear", "Prediction", "explain"]


def explain(
    model: nn.Module,
    *inputs: Any,
    device: str | torch.device | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What `torch.compile(model, backend="fp6", mode=mode, options=options)(*inputs, **kwargs)` would do.

    Nothing runs: the call is traced with tensors that have no values, on a GPU that need not be there. The model is not
    changed, and code that is compiled already stays. Weights on the meta device will do; their errors are then unknown. As
    in torch.compile, weights that require grad are skipped while grad mode is on: use torch.no_grad().

    Args:
        model: a module, or what torch.compile made of one.
        inputs, kwargs: of the call to explain, for decoding one token with its static KV cache.
        device: where it would run: "H200", "RTX 4090", ... (devices.DEVICES), "cpu", "cuda", or None for where it is.
        mode, options: as for the backend, see config.Options.

    Raises:
        ValueError: an unknown device or option; a model that cannot be copied; with `strict`, a linear that cannot be
            quantized.
    """
    from fp6_compile.explanation.fakes import Fakes
    from fp6_compile.explanation.trace import Trace

    parsed = Options.parse(mode, options)
    model = getattr(model, "_orig_mod", model)
    home = _home(model)
    about, target = _target(device, home)
    unknown = None
    with contextlib.ExitStack() as stack:
        if target.type == "cuda":
            unknown = _enter(stack, about)
            target = torch.device("cpu") if unknown else target
        fakes = Fakes(target, home)
        copied, args, named = fakes.copy((model, inputs, kwargs))
        trace = Trace(fakes, copied, parsed, unknown)
        breaks, stopped = _call(trace, fakes, copied, args, named)
    return _explanation(type(model).__name__, about, trace, breaks, stopped)


def _home(model: nn.Module) -> torch.device:
    """Where a model is: on the device of its first tensor that is on one."""
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _target(device: str | torch.device | None, home: torch.device) -> tuple[Device, torch.device]:
    """What is known of the device, and where its tensors say that they are."""
    if device is None or str(device).split(":")[0] in ("cpu", "cuda"):
        where = home if device is None else torch.device(device)
        return this_device(where), torch.device(where.type)
    return device_named(str(device)), torch.device("cuda")


def _enter(stack: contextlib.ExitStack, about: Device) -> str | None:
    """Pretend that the device is there; or why that is not possible."""
    try:
        from fp6_compile.fake_gpu.device import fake_device
        from fp6_compile.fake_gpu.driver import no_self_test

        stack.enter_context(fake_device(DEVICES["H200"] if _is_stand_in(about) else about))
        stack.enter_context(no_self_test())
    except (ImportError, OSError, ValueError) as error:
        return f"no code for a GPU can be generated here: {error}"
    return None


def _call(trace: Any, fakes: Any, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Trace one call: Dynamo's reasons for its graph breaks, and why the call ended early, if it did."""
    from fp6_compile.explanation.isolation import isolated

    stopped = None
    with isolated(trace) as breaks, fakes.mode:
        try:
            torch.compile(model, backend=trace)(*args, **kwargs)
        except Exception as error:
            if not trace.step.graphs:
                raise
            stopped = f"{_place(error)}: {type(error).__name__}: {_line(str(error))}"
    return breaks, stopped


def _place(error: Exception) -> str:
    """The innermost line of an error that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "in torch"


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _explanation(name: str, about: Device, trace: Any, breaks: Sequence[Any], stopped: str | None) -> Explanation:
    step, options = trace.step, trace.options
    unknown = trace.unknown or (step.failures[0] if step.failures else None)
    linears = tuple(_linear(found) for found in trace.found.values())
    graphs = _cuda_graphs(about, trace, bool(breaks), unknown)
    launches = None if unknown else tuple(step.launches)
    return Explanation(
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
        note="counted in code for an H200: for this device none can be generated here" if _is_stand_in(about) else None,
    )


def _is_stand_in(about: Device) -> bool:
    return about.arch is not None and not about.is_cuda


def _linear(found: Any) -> Linear:
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
    why = ": ".join(part.strip() for part in (_line(text), explanation) if part.strip())
    return Break(frame.filename, frame.lineno or 0, (frame.line or "").strip(), why)


def _cuda_graphs(about: Device, trace: Any, broken: bool, unknown: str | None) -> CudaGraphs:
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
    """Inductor's words in one line, with the place that it found."""
    what = _line(text).removeprefix("skipping cudagraphs due to ").partition(" Found from")[0].rstrip(".")
    places = re.findall(r'File "(.+?)", line (\d+)', text)
    return f"{what} ({':'.join(places[-1])})" if places else what


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
