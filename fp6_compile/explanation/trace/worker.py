"""The process that compiles a call for a fake GPU: it reads a Request, asks about values of weights, and sends a Result.

What it changes in torch dies with it. See explanation/process.py for the other side.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from fp6_compile._compat import dynamo
from fp6_compile.explanation.request import Request
from fp6_compile.explanation.result import Result
from fp6_compile.explanation.trace.backend import Trace
from fp6_compile.explanation.trace.fakes import Fakes
from fp6_compile.explanation.trace.summary import first_line, is_stand_in, result
from fp6_compile.fake_gpu.devices import DEVICES, Device

_DYNAMO_CONFIG = {
    # Neither read nor write the sizes that Dynamo remembers from earlier processes.
    "automatic_dynamic_local_pgo": False,
    "automatic_dynamic_remote_pgo": False,
    "error_on_recompile": False,
    "suppress_errors": False,
}


def main() -> None:
    """Read a request from standard input, write the answer to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process, which then ends this one
    read, write = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the model prints must not come between

    def send(kind: str, content: Any) -> None:
        pickle.dump((kind, content), write)
        write.flush()

    log = logging.getLogger("fp6_compile")
    log.addHandler(_LogSender(send))
    log.propagate = False
    try:
        send("result", explained(pickle.load(read), _asker(send, read)))
    except Exception as error:
        send("error", (_picklable(error), traceback.format_exc()))


class _LogSender(QueueHandler):
    """Sends log records to the other process."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        """Called for every record."""
        self._send("log", record)


def _asker(send: Callable[[str, Any], None], read: BinaryIO) -> Callable[..., Any]:
    def ask(*question: Any) -> Any:
        send("question", question)
        answer, error = pickle.load(read)
        if error is not None:
            raise error
        return answer

    return ask


def _picklable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its text; of Dynamo's error about a failed backend, what the backend raised."""
    error = getattr(error, "inner_exception", error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def explained(request: Request, ask: Callable[..., Any]) -> Result:
    """Compile the call as far as its code, for a fake GPU; `ask` answers questions about values (values.py)."""
    with contextlib.ExitStack() as stack:
        target, unknown = torch.device(request.target), None
        if target.type == "cuda" and (unknown := _enter_fake_gpu(stack, request.about)):
            target = torch.device("cpu")
        fakes = Fakes(target, request.home)
        model, args, kwargs, options, settings = fakes.read(request.call)
        settings.apply(stack)
        stack.enter_context(dynamo.config.patch(_DYNAMO_CONFIG))
        stack.enter_context(dynamo.functorch_config.patch(enable_autograd_cache=False))
        trace = Trace(fakes, model, options, ask, unknown)
        breaks, stopped = _call(trace, fakes, model, args, kwargs)
        return result(type(model).__name__, request.about, trace, breaks, stopped)


def _enter_fake_gpu(stack: contextlib.ExitStack, about: Device) -> str | None:
    """Make the device appear to be there; or return why that is not possible."""
    try:
        from fp6_compile.fake_gpu.device import fake_device
        from fp6_compile.fake_gpu.driver import no_self_test

        stack.enter_context(fake_device(DEVICES["H200"] if is_stand_in(about) else about))
        stack.enter_context(no_self_test())
    except (ImportError, OSError, ValueError) as error:
        return f"no code for a GPU can be generated here: {error}"
    return None


def _call(
    trace: Trace, fakes: Fakes, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], str | None]:
    """Trace one call: Dynamo's reasons for its graph breaks, and why the call ended early, if it did."""
    before, stopped = len(dynamo.graph_break_reasons), None
    with fakes.mode:
        try:
            torch.compile(model, backend=trace)(*args, **kwargs)
        except Exception as error:
            if not trace.step.graphs:
                raise
            stopped = f"{_place(error)}: {type(error).__name__}: {first_line(str(error))}"
    return dynamo.graph_break_reasons[before:], stopped


def _place(error: Exception) -> str:
    """The innermost line of an error that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "in torch"
