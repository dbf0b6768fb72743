"""Milliseconds per token of a Llama-shaped model with random weights, or of a local transformers model, by width of weights.

    python -m benchmarks.decode --size 1b --device cpu --threads 1 --batch 1 4
    python -m benchmarks.decode --size 8b --batch 1 4 16 64 --out decode_8b.json --plot decode_8b.png    # on a GPU
    python -m benchmarks.decode --model FOLDER --temperature 0.8 --steps-per-graph 8

Prefill and decode are compiled; a decode step is one graph that also chooses the token, and on a GPU a CUDA graph. Every
provider runs in a process of its own, so that its memory can be measured; an earlier process, with empty caches, measures
how long compilation takes. On a CPU the processes take turns, round by round, because the load of the machine changes; on a
GPU each runs alone (--turns, --alone). It prints a table for each batch size, and last one line of JSON.

All linears have six-bit weights, the head, too (--head 16 leaves it in sixteen).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode.arguments import parse
from benchmarks.decode.measure import Settings
from benchmarks.decode.model.llama import SIZES, parameter_count
from benchmarks.decode.report import draw, show, summary, write
from benchmarks.decode.worker import Worker
from benchmarks.system.bandwidth import read_bandwidth
from benchmarks.system.environment import cpu, gpu, versions


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, print."""
    arguments, settings = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    document: dict[str, Any] = {**vars(arguments), **about(arguments), "out": None, "plot": None}
    document["results"] = {batch: {} for batch in arguments.batch}
    with tempfile.TemporaryDirectory() as caches:
        settings = [dataclasses.replace(each, cache=_folder(caches, each.provider)) for each in settings]
        for together in [[each] for each in settings] if arguments.alone else [settings]:
            with Providers(together, arguments) as providers:
                for batch in arguments.batch:
                    document["results"][batch] |= providers.measure(batch)
                    write(document, arguments.out)
    for batch, results in document["results"].items():
        show(f"{document['model']}, batch {batch}, {document['device_name']}", results)
    if arguments.plot:
        try:
            draw(document, arguments.plot)
        except (ImportError, ValueError) as error:  # the figures are still there to be printed
            print(f"no picture: {error}")
    print(json.dumps(document))


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """The machine, the software, and the model."""
    cuda, size = arguments.device == "cuda", SIZES.get(arguments.model)
    known = {**versions(), "parameters": parameter_count(size) if size else None}
    if cuda:
        return {**known, **gpu(), "device": "cuda", "device_name": torch.cuda.get_device_name()}
    return {**known, **cpu(), "device_name": f"CPU, {torch.get_num_threads()} thread(s)"}


class Providers:
    """Providers whose processes live at the same time and take turns."""

    def __init__(self, settings: list[Settings], arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.failed: dict[str, str] = {}
        self.cold: dict[str, dict[str, Any]] = {}
        self.workers: dict[str, Worker] = {}
        self.bandwidth: float | None = None
        for each in settings:
            self._guarded(each.provider, self._start, each)

    def __enter__(self) -> Providers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def measure(self, batch: int) -> dict[str, dict[str, Any]]:
        """The figures of each provider at a batch size, or its error."""
        first = batch == self.arguments.batch[0]
        known = {name: self._guarded(name, self._prepare, name, batch, first) for name in list(self.workers)}
        rounds = self._rounds()
        results = {name: {"error": error} for name, error in self.failed.items()}
        for name in list(self.workers):
            prefill, seconds = rounds[name]
            more = self._more(name, statistics.median(seconds))
            results[name] = summary({**known[name], **more}, seconds, prefill, batch, self.bandwidth)
        return results

    def _start(self, settings: Settings) -> None:
        name, batch = settings.provider, self.arguments.batch[0]
        if settings.provider != "eager" and not self.arguments.once:
            print(f"{name}: building and compiling for batch {batch}, with empty caches", flush=True)
            worker = Worker(settings, _say)
            try:
                self.cold[name] = worker.prepare(batch)
            finally:
                worker.close()
        print(f"{name}: building", flush=True)
        self.workers[name] = Worker(settings, _say)

    def _prepare(self, name: str, batch: int, first: bool) -> dict[str, Any]:
        known = self.workers[name].prepare(batch)
        taken = known.pop("compile_s")
        print(f"{name}: ready for batch {batch} after {taken:.1f} s", flush=True)
        warm = first and name in self.cold
        cold = self.cold[name]["compile_s"] if warm else taken
        if name == "eager":
            return {**self.workers[name].known, **known}
        times = {"compile_cold_s": cold, "compile_warm_s": taken if warm else None}
        return {**self.workers[name].known, **known, **times}

    def _rounds(self) -> dict[str, tuple[list[float], list[float]]]:
        """Seconds of prefills, and seconds per token of steps, by provider."""
        taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in self.workers}
        for number in range(1, self.arguments.rounds + 1):
            # In every round, because on a CPU it changes with the load of the machine.
            self.bandwidth = max(self.bandwidth or 0.0, read_bandwidth(device=self.arguments.device))
            for name in list(self.workers):
                result = self._guarded(name, self.workers[name].round)
                if result is not None:
                    prefill, seconds, _ = result
                    taken[name][0].append(prefill)
                    taken[name][1].extend(seconds)
                    print(f"round {number}, {name}: {1e3 * statistics.median(seconds):.2f} ms per token", flush=True)
        return taken

    def _more(self, name: str, p50: float) -> dict[str, Any]:
        """Figures that are measured after the times, so that they cannot disturb them; without those that fail."""
        worker, more = self.workers[name], dict[str, Any]()
        asked = {"peak_bytes": worker.peak, "kernels": worker.kernels}
        if self.arguments.plot:
            asked["breakdown"] = functools.partial(worker.breakdown, p50 * 1e3)
        if self.arguments.lora and name not in ("int8", "int4"):
            asked["adapter"] = worker.adapter
        for what, ask in asked.items():
            try:
                more[what] = ask()
            except RuntimeError as error:
                print(f"{name}: no {what}: {error}", flush=True)
        adapter = more.pop("adapter", {})
        return {**more, **adapter}

    def _guarded(self, name: str, function: Any, *args: Any) -> Any:
        """The function's result; a provider that fails is left out from then on, and the others go on."""
        try:
            return function(*args)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            self.failed[name] = str(error)
            if name in self.workers:
                self.workers.pop(name).close()
            return None


def _say(text: str) -> None:
    print(text, flush=True)


def _folder(caches: str, provider: str) -> str:
    folder = Path(caches) / provider
    folder.mkdir()
    return str(folder)


if __name__ == "__main__":
    main()
