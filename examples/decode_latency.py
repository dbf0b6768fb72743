"""Milliseconds per token of a Llama-shaped model with random weights, six bits beside sixteen.

    python -m examples.decode_latency --size 1b --device cpu --batch 1 --tokens 64

Every backend has a process of its own (its memory is then its own), and the processes take turns, round by round, because
other work on the machine comes and goes. A card for people; the last line is one JSON document.

What it leaves out: prefill, sampling other than greedy, trained weights.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.bandwidth import read_bandwidth
from benchmarks.cpu import environment
from examples.decode.card import compare, last_line, show, summary
from examples.decode.measure import Settings, Worker
from examples.decode.model import SIZES


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, print."""
    arguments = _arguments(argv)
    packing = {"format": arguments.format, "group_size": arguments.group_size}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    workers = {}
    for backend in arguments.backends:
        print(f"building and compiling with {backend} ...", flush=True)
        workers[backend] = Worker(
            Settings(
                *(backend, arguments.size, arguments.device, arguments.batch, arguments.tokens, arguments.threads),
                packing if backend == "fp6" else {},
            )
        )
    seconds: dict[str, list[float]] = {backend: [] for backend in workers}
    bandwidth = None
    for number in range(1, arguments.rounds + 1):
        if arguments.device == "cpu":  # between the rounds, because it changes with what else is running
            bandwidth = max(bandwidth or 0.0, read_bandwidth())
        for backend, worker in workers.items():
            taken, _ = worker.round()
            seconds[backend] += taken
            print(f"round {number}, {backend}: {1e3 * statistics.median(taken):.2f} ms per token", flush=True)
    for worker in workers.values():
        worker.close()
    results = {b: summary(worker.known, seconds[b], arguments.batch, bandwidth) for b, worker in workers.items()}
    parameters = next(iter(results.values()))["parameters"]
    show(f"{arguments.size}: {parameters / 1e6:.0f} M parameters, batch {arguments.batch}, {arguments.device}", results)
    where = environment() if arguments.device == "cpu" else {"gpu": torch.cuda.get_device_name()}
    about = {**vars(arguments), **where, "read_gb_s": bandwidth and round(bandwidth, 1)}
    last_line({**about, **compare(results), "results": results})


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=_positive, default=1)
    parser.add_argument("--tokens", type=_positive, default=64, help="of a round, and the length of the cache")
    parser.add_argument("--rounds", type=_positive, default=3, help="turns of each backend")
    parser.add_argument("--threads", type=_positive, help="torch.set_num_threads")
    parser.add_argument("--backends", nargs="+", default=["inductor", "fp6"], choices=["inductor", "fp6"])
    parser.add_argument("--format", default="e3m2", choices=["e3m2", "e2m3"])
    parser.add_argument("--group-size", type=_positive, help="inputs that share a scale; without it a row")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 3:
        parser.error(f"--tokens: got {arguments.tokens}, need at least 3")
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, need a positive number")
    return value


if __name__ == "__main__":
    main()
