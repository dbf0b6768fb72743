"""One provider in a process of its own, so that its memory is its own.

The process builds the model, compiles for a batch size, and then decodes a round whenever it is asked to: several processes
can take turns on a noisy machine.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.decode.measure import Bench, Settings


class Worker:
    """The process of one provider: `worker.prepare(4)` calls `Bench.prepare` there. RuntimeError is what it failed with."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = print) -> None:
        # Spawned: a fork would share this process's memory, and torch's threads do not survive one.
        context = multiprocessing.get_context("spawn")
        self._say, self._name = say, settings.provider
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(settings, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that a process that dies ends the wait for it
        self.known: dict[str, Any] = self._answer("building")

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or not hasattr(Bench, method):
            raise AttributeError(method)

        def call(*args: Any) -> Any:
            self._pipe.send((method, args))
            return self._answer({"prepare": "compiling"}.get(method, method))

        return call

    def _answer(self, doing: str) -> Any:
        start = time.monotonic()
        while not self._pipe.poll(10.0):
            self._say(f"{self._name}: {doing} ... {time.monotonic() - start:.0f} s")
        try:
            failed, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process ended while {doing}: out of memory?") from None
        if failed:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()


def serve(settings: Settings, pipe: Connection) -> None:
    """Runs in the process: build a Bench and call its methods. Each answer is (whether it failed, result)."""
    bench = _answer(pipe, lambda: Bench(settings), lambda bench: bench.known)
    while bench is not None and (message := pipe.recv()) is not None:
        method, args = message
        _answer(pipe, lambda method=method, args=args: getattr(bench, method)(*args))  # type: ignore[misc]


def _answer(pipe: Connection, function: Callable[[], Any], known: Callable[[Any], Any] = lambda result: result) -> Any:
    try:
        result = function()
        pipe.send((False, known(result)))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        pipe.send((True, f"{type(error).__name__}: {lines[0] if lines else ''}"))
        return None
    return result
