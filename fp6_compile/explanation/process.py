"""Another Python process that compiles a call for a fake GPU, as seen from the process that asks for it.

Compiling for a fake GPU replaces functions of torch.cuda, of Inductor and of torch's C++ library, for all threads of a
process. That is why it happens in a process that does nothing else and then ends.

The process is new, not forked: a fork of a process with threads may hang, because the locks that those threads hold (of
Dynamo, of OpenMP) are never released in it. multiprocessing's "spawn" would run the user's script anew, up to its
`if __name__ == "__main__"`; this process does not.

Messages are pickles over its standard input and output. What it prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fp6_compile.explanation.request import Request
from fp6_compile.explanation.result import Result

_CODE = "import sys; sys.path[:] = {path!r}; from fp6_compile.explanation.trace.worker import main; main()"
_ENVIRONMENT = {
    # A CUDA context would be made on a GPU for nothing.
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    # Inductor starts a pool of processes otherwise.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def explained(request: Request, answer: Callable[..., Any]) -> Result:
    """What a new process finds out about the call. Its questions are answered by `answer(*question)` here.

    Raises what failed there, with the traceback of that process as its cause, and RuntimeError if the process dies.
    """
    with _started() as process:
        _send(process, request)
        while True:
            kind, content = _receive(process)
            if kind == "result":
                result: Result = content
                return result
            if kind == "error":
                error, trace = content
                raise error from RuntimeError(f"in the process that explains:\n{trace}")
            if kind == "log":
                logging.getLogger(content.name).handle(content)
            else:
                _send(process, _answer(answer, content))


@contextlib.contextmanager
def _started() -> Iterator[Any]:
    """The process. It ends with the `with` block, also where that is left by Ctrl-C."""
    command = [sys.executable, "-c", _CODE.format(path=[str(entry) for entry in sys.path])]
    environment = {**os.environ, **_ENVIRONMENT}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _send(process: Any, message: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has died: _receive says so
        pickle.dump(message, process.stdin)
        process.stdin.flush()


def _receive(process: Any) -> Any:
    try:
        return pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError) as error:
        raise RuntimeError(f"fp6: the process that explains ended with exit code {process.wait()}") from error


def _answer(answer: Callable[..., Any], question: tuple[Any, ...]) -> tuple[Any, ValueError | None]:
    """The answer, or the error that stands for it."""
    try:
        return answer(*question), None
    except ValueError as error:
        return None, error
