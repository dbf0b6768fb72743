"""Time on a device, in two measures, both of random data and of weights that are not in its cache.

    cold    triton.testing.do_bench: a buffer larger than the L2 cache is overwritten before each call, and the call alone is
            timed, launch included. Comparable with published tables. It costs every kernel some microseconds that decoding
            does not have: the first bytes after a pause, and dirty cache lines written back.
    graph   a CUDA graph of calls that read one weight after another, of a ring of copies at least four times as large as the
            L2 cache, so that each comes from memory: as in a decoder, whose layers follow each other in a graph.

A figure is the median, beside the 20th and 80th percentile. `Gpu` is the device; `Cpu` replaces it where there is none, to
run all other code: its times mean nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import triton

Call = Callable[[], Any]
RING_OVER_L2 = 4
GRAPH_SECONDS = 2e-3  # of work in a graph, beside which its launch is nothing
GRAPH_CALLS = 4096  # at most, in a graph
MEASURES = ("graph", "cold")


class Device(Protocol):
    """What a measure needs of a device. Times are seconds."""

    kind: str
    device: torch.device
    l2_bytes: int
    host_calls: int  # to time the host by

    def cold(self, call: Call) -> list[float]:
        """Times of single calls, each with an empty cache."""

    def record(self, calls: Sequence[Call]) -> Call:
        """A function that replays `calls` one after the other, without the host."""

    def seconds(self, run: Call) -> float:
        """How long the device is busy with `run`."""

    def synchronize(self) -> None:
        """Wait until nothing is running."""


class Gpu:
    """The current CUDA device."""

    kind, host_calls = "measured", 200

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def cold(self, call: Call) -> list[float]:
        """See `Device`. Warmed up for 25 ms, then 100 ms of calls and of clearing the cache."""
        times: list[float] = triton.testing.do_bench(call, warmup=25, rep=100, return_mode="all")
        return [ms / 1e3 for ms in times]

    def record(self, calls: Sequence[Call]) -> Call:
        """See `Device`. Outputs of captured calls share memory, as in a decoder's graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, run: Call) -> float:
        """See `Device`. Between two events on the stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        """See `Device`."""
        torch.cuda.synchronize()


class Cpu:
    """A stand-in for a GPU: few calls, timed by the host's clock, and a cache that is smaller than any ring."""

    kind, host_calls = "stand-in", 3
    device = torch.device("cpu")
    l2_bytes = 1 << 10

    def cold(self, call: Call) -> list[float]:
        """See `Device`; nothing is cleared."""
        return [self.seconds(call) for _ in range(3)]

    def record(self, calls: Sequence[Call]) -> Call:
        """See `Device`; the host makes the calls."""
        return lambda: [call() for call in calls]

    def seconds(self, run: Call) -> float:
        """See `Device`."""
        start = time.perf_counter()
        run()
        return max(time.perf_counter() - start, 1e-9)

    def synchronize(self) -> None:
        """See `Device`."""


def ring_copies(nbytes: int, l2_bytes: int) -> int:
    """Copies of a weight of `nbytes` that are more than four L2 caches together; two at least, so that calls rotate."""
    if nbytes <= 0:
        raise ValueError(f"ring: a weight of {nbytes} bytes; a provider keeps its weights as parameters or buffers")
    return max(2, RING_OVER_L2 * l2_bytes // nbytes + 1)


def check_ring(sizes: Sequence[int], l2_bytes: int) -> None:
    """Raises ValueError when weights of these `sizes` in bytes, read in turn, could stay in the cache."""
    if sum(sizes) <= RING_OVER_L2 * l2_bytes:
        raise ValueError(
            f"ring: {len(sizes)} weights of {sum(sizes)} bytes in all could stay in an L2 cache of {l2_bytes} bytes; "
            f"needs more than {RING_OVER_L2} times as much"
        )


def graph(device: Device, calls: Sequence[Call], sizes: Sequence[int]) -> list[float]:
    """Seconds per call in replays of a graph of whole rounds over `calls`, each of which reads a weight of its own.

    `sizes` are the weights' bytes. Raises ValueError when they could stay in the cache.
    """
    check_ring(sizes, device.l2_bytes)
    for call in calls:
        call()  # compiles, and lets libraries set up what must not be captured
    device.synchronize()
    once = device.record(calls)
    once()
    one_round = device.seconds(once)
    rounds = max(1, min(math.ceil(GRAPH_SECONDS / one_round), GRAPH_CALLS // len(calls)))
    run = once if rounds == 1 else device.record([*calls] * rounds)
    run()
    replays = max(5, min(20, round(0.2 / (one_round * rounds))))
    return [device.seconds(run) / (rounds * len(calls)) for _ in range(replays)]


def host(device: Device, call: Call, repeats: int = 7) -> list[float]:
    """Seconds of the host per call, the device far behind or done: what a launch costs where no graph replays it."""
    times = []
    for _ in range(repeats + 1):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(device.host_calls):
            call()
        times.append((time.perf_counter() - start) / device.host_calls)
    device.synchronize()
    return times[1:]


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def ceilings(device: Device, nbytes: int = 1 << 31, size: int = 8192) -> dict[str, float]:
    """The device's rates, measured on random data: copying and reading `nbytes` (GB/s), and matrix products (TFLOP/s)."""
    source = torch.randint(-128, 128, (nbytes,), dtype=torch.int8, device=device.device)
    target = torch.empty_like(source)
    reads: list[Call] = [source.view(torch.int32).amax, source.view(torch.int64).sum]
    copy = quantiles(device.cold(lambda: target.copy_(source)))[1]
    read = min(quantiles(device.cold(each))[1] for each in reads)
    rates = {"copy_gb_s": round(2 * nbytes / copy / 1e9, 1), "read_gb_s": round(nbytes / read / 1e9, 1)}
    for name, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16}.items():
        a, b = (torch.randn(size, size, dtype=dtype, device=device.device) for _ in range(2))
        product = quantiles(device.cold(lambda a=a, b=b: a @ b))[1]  # type: ignore[misc]
        rates[f"matmul_{name}_tflop_s"] = round(2 * size**3 / product / 1e12, 3)
    return rates
