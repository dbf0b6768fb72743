"""The process behind interpret.py: executes generated modules with every kernel interpreted on the CPU.

Started as `python -m <package>.interpreter JOBS RESULTS` with TRITON_INTERPRET=1, which Triton reads when it is imported.
The module's own `call` runs unchanged: buffers, order of launches and grids are Inductor's. What is replaced is what it
imports: allocation on CUDA, streams, the device guard, and AsyncCompile, which here hands the kernel to the interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor.runtime as inductor_runtime
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_helpers, triton_heuristics

from . import interpreter_fixes

# The interpreter runs one program after the other in Python, so few large blocks are fast. Inductor leaves a mask out
# where the size is a multiple of its largest block (4096 for x), and any smaller power of two divides that as well.
_LARGEST_BLOCK = {"XBLOCK": 1024, "YBLOCK": 64, "ZBLOCK": 16, "R0_BLOCK": 2048, "R1_BLOCK": 64}
_LARGEST_BLOCK_OF_A_REDUCTION = {**_LARGEST_BLOCK, "XBLOCK": 16}


class InterpretedKernel:
    """Stands where Inductor's CachingAutotuner would: the same `run`, launched through the interpreter."""

    def __init__(self, fn: Any, decorator: dict[str, Any]) -> None:
        self.fn = fn
        self.meta = decorator["inductor_meta"]
        parameters = inspect.signature(fn.fn).parameters.values()
        self.constexprs = [p.name for p in parameters if "constexpr" in str(p.annotation)]
        self.names = [p.name for p in parameters if p.name not in self.constexprs]
        self.blocks = self._choose_blocks(decorator)

    def _choose_blocks(self, decorator: dict[str, Any]) -> dict[str, int]:
        """A value for each constexpr parameter: the decorator's where it has one, otherwise one block per size."""
        given = decorator.get("config") or next(iter(decorator.get("configs") or ()), {}).get("kwargs", {})
        hints = decorator.get("size_hints") or {}
        largest = _LARGEST_BLOCK_OF_A_REDUCTION if any(hint.startswith("r") for hint in hints) else _LARGEST_BLOCK
        blocks = {}
        for name in self.constexprs:
            hint = hints.get(name.removesuffix("BLOCK").lower())
            blocks[name] = given.get(name) or (min(1 << (hint - 1).bit_length(), largest[name]) if hint else 1)
        return blocks

    def run(self, *args: Any, stream: Any = None, **_: Any) -> None:
        """Launch on the grid Inductor would launch on."""
        count = len(self.names)
        scope = dict(zip(self.names, args[:count], strict=True))
        scope |= dict(zip(self.meta.get("extra_launcher_args", ()), args[count:], strict=True))
        grid = triton_heuristics.GridExpr.from_meta(self.meta, self.blocks).eval_slow({**scope, **self.blocks})
        self.fn[tuple(map(int, grid))](*args[:count], **self.blocks)


class _Heuristics:
    """In place of the module triton_heuristics inside a kernel's text: every decorator keeps the function as it is."""

    def __getattr__(self, name: str) -> Any:
        return lambda **decorator: lambda fn: InterpretedKernel(fn, decorator)


class _Session:
    """Files for the kernels' text (the interpreter reads source from disk) and the stand-ins around a module."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.counter = itertools.count()

    def load(self, text: str) -> dict[str, Any]:
        path = self.directory / f"generated_{next(self.counter)}.py"
        path.write_text(text)
        scope: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        exec(compile(text, str(path), "exec"), scope)
        return scope

    def install(self) -> None:
        """Replace, in this process, what a generated module imports from torch (torch 2.11, 2.13 and 2.15)."""
        guards = torch._C._dynamo.guards
        guards._empty_strided_cuda = guards._empty_strided_cpu
        torch._C._cuda_getCurrentRawStream = lambda index: 0
        torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()
        torch.cuda.set_device = lambda device: None
        AsyncCompile.triton = lambda _, name, text, device_str="cuda", **kwargs: self.load(text)[name]
        AsyncCompile.wait = lambda _, scope: None
        inductor_runtime.triton_heuristics = _Heuristics()
        triton_helpers.set_driver_to_gpu = lambda: None
        triton_helpers.libdevice = interpreter_fixes.Libdevice()

    def run(self, code: str, inputs: list[Any]) -> list[Any]:
        on_cpu = re.sub(r"device\(type='cuda'(, index=\d+)?\)", "device(type='cpu')", code)
        return list(self.load(on_cpu)["call"](list(inputs)))


def main(jobs_path: str, results_path: str) -> None:
    """Run every (code, inputs) of the file `jobs_path`; the lists of outputs go to `results_path`."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run by interpret.py, which sets TRITON_INTERPRET=1"
    jobs: dict[str, Any] = torch.load(jobs_path)
    interpreter_fixes.apply()
    for name in jobs["imports"]:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as directory:
        session = _Session(Path(directory))
        session.install()
        results = [session.run(code, inputs) for code, inputs in jobs["jobs"]]
    torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
