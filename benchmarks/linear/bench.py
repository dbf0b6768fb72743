"""A run of measurements: problems, rings of copies of a weight, and rows that are written as they are measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.linear import timing
from benchmarks.linear.providers import PROVIDERS, SixBit, Spec, weight_bytes
from benchmarks.linear.results import Results, Row
from benchmarks.linear.shapes import Shape
from benchmarks.sass.cases import DTYPES

TOLERANCE = 1e-2  # of the norm: a rounding to BF16 is 0.002


@dataclass(frozen=True)
class Problem:
    """A weight's shape, its format, and the dtype of activations."""

    shape: Shape
    dtype: str
    format: str
    group_size: int | None

    def row(self, kind: str, provider: str, measure: str, m: int) -> Row:
        """The columns that say what was measured."""
        ours = provider == "fp6"
        return {
            **{"kind": kind, "provider": provider, "measure": measure, "m": m, "dtype": self.dtype},
            **{"shape": self.shape.name, "n": self.shape.n, "k": self.shape.k},
            **{"format": self.format if ours else None, "group_size": self.group_size if ours else None},
        }


@dataclass(frozen=True)
class Ring:
    """Copies of a provider's weight, to be read in turn."""

    modules: Sequence[nn.Module]
    nbytes: int  # of each

    @classmethod
    def of(cls, provider: str, weight: Tensor, spec: Spec, l2_bytes: int) -> Ring:
        """So many copies that together they are larger than four L2 caches."""
        module = PROVIDERS[provider](weight, spec)
        nbytes = weight_bytes(module)
        others = (copy.deepcopy(module) for _ in range(timing.ring_copies(nbytes, l2_bytes) - 1))
        return cls([module, *others], nbytes)


def figures(times: Sequence[float], m: int, n: int, k: int, nbytes: int, itemsize: int) -> Row:
    """The columns that are computed from seconds per call, for a weight of `nbytes`."""
    p20, p50, p80 = timing.quantiles(times)
    moved = nbytes + (m * k + m * n) * itemsize
    return {
        **{"us_p50": round(p50 * 1e6, 3), "us_p20": round(p20 * 1e6, 3), "us_p80": round(p80 * 1e6, 3)},
        **{"weight_bytes": nbytes, "bytes": moved, "gb_s": round(moved / p50 / 1e9, 2)},
        "tflop_s": round(2 * m * n * k / p50 / 1e12, 4),
    }


def compare(row: Row, rows: Sequence[Row], copy_gb_s: float) -> None:
    """Add the share of the copy's rate, and cuBLAS' time divided by this row's, if `rows` or the row itself has it."""
    row["share_of_copy"] = round(row["gb_s"] / copy_gb_s, 3)
    same = ("measure", "n", "k", "m", "dtype")
    for base in (*rows, row):
        if base["provider"] == "linear" and base["us_p50"] and all(base[name] == row[name] for name in same):
            row["speedup"] = round(base["us_p50"] / row["us_p50"], 3)


class Bench:
    """A run: a device, a file of results, and the second at which to stop."""

    def __init__(self, device: timing.Device, results: Results, providers: Sequence[str], until: float) -> None:
        self.device, self.results, self.providers, self.until = device, results, providers, until
        self.left_out: list[str] = []
        self.failed: list[str] = []

    def sweep(self, problems: Sequence[Problem], batches: Sequence[int]) -> None:
        """Every batch size, problem, measure and provider that has no row yet, in this order."""
        rings: dict[tuple[Problem, str], Ring | None] = {}
        for problem, row in self._rows(problems, batches):
            if self.results.has(row):
                continue
            if time.monotonic() > self.until:
                self.left_out.append(f"{row['shape']} {row['dtype']} M = {row['m']} {row['measure']} {row['provider']}")
                continue
            try:
                key = problem, row["provider"]
                if key not in rings:
                    rings[key] = None  # tried once
                    rings[key] = self._ring(row["provider"], problem)
                if ring := rings[key]:
                    self._measure(row, ring, DTYPES[problem.dtype])
                    self._keep(row)
            except Exception as error:  # of one provider: the other rows are still worth having
                row["note"] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                self.failed.append(f"{row['provider']} {problem.shape.name} M = {row['m']}: {row['note']}")
                self._keep(row)

    def host(self, dtype: str) -> None:
        """The host's time per call: on a weight so small that the device is always faster, and on one whose K is split."""
        for size in (256, 4096):
            self._host(Problem(Shape(f"host {size}", size, size, "small"), dtype, "e3m2", None))

    def _host(self, problem: Problem) -> None:
        n, k, dtype = problem.shape.n, problem.shape.k, DTYPES[problem.dtype]
        weight, x = (torch.randn(rows, k, device=self.device.device).to(dtype) for rows in (n, 1))
        for provider in ("linear", "fp6"):
            row = problem.row(self.device.kind, provider, "host", 1)
            if not self.results.has(row):
                module = PROVIDERS[provider](weight, Spec(dtype, problem.format))
                p20, p50, p80 = timing.quantiles(timing.host(self.device, lambda module=module: module(x)))  # type: ignore[misc]
                row |= {"us_p50": round(p50 * 1e6, 3), "us_p20": round(p20 * 1e6, 3), "us_p80": round(p80 * 1e6, 3)}
                self._keep(row)

    def _rows(self, problems: Sequence[Problem], batches: Sequence[int]) -> Iterator[tuple[Problem, Row]]:
        for m in batches:
            for problem in problems:
                for measure in timing.MEASURES:
                    for provider in self.providers:
                        yield problem, problem.row(self.device.kind, provider, measure, m)

    def _ring(self, provider: str, problem: Problem) -> Ring:
        dtype, shape = DTYPES[problem.dtype], problem.shape
        torch.manual_seed(shape.n * 31 + shape.k)  # the same weight for every provider
        weight = torch.randn(shape.n, shape.k, dtype=dtype, device=self.device.device) / shape.k**0.5
        return Ring.of(provider, weight, Spec(dtype, problem.format, problem.group_size), self.device.l2_bytes)

    def _measure(self, row: Row, ring: Ring, dtype: torch.dtype) -> None:
        m, n, k = row["m"], row["n"], row["k"]
        x = torch.randn(m, k, dtype=dtype, device=self.device.device)
        if isinstance(ring.modules[0], SixBit):
            row["error"] = round(ring.modules[0].error(x, ring.modules[0](x)), 6)
            if not row["error"] <= TOLERANCE:
                raise ValueError(f"wrong: relative error {row['error']}, allowed {TOLERANCE}")
        calls = [lambda module=module: module(x) for module in ring.modules]
        if row["measure"] == "graph":
            row["copies"] = len(calls)
            times = timing.graph(self.device, calls, [ring.nbytes] * len(calls))
        else:
            times = self.device.cold(calls[0])
        row |= figures(times, m, n, k, ring.nbytes, x.element_size())
        compare(row, self.results.rows, self.results.about["copy_gb_s"])

    def _keep(self, row: Row) -> None:
        self.results.add(row)
        print(line(self.results.rows[-1]), flush=True)


HEAD = "          shape              dtype     M  measure  provider           us  cuBLAS/us    GB/s  of copy"


def line(row: Row) -> str:
    """A row as text, which begins with its kind: measured, predicted or stand-in."""
    text = f"{row['kind']:9} {row['shape']:18} {row['dtype']:5} {row['m']:5}  {row['measure']:7}  {row['provider']:13}"
    if row["us_p50"] is None:
        return f"{text} {row['note']}"
    text += f"{row['us_p50']:10.2f}"
    if row["speedup"] is not None:
        text += f"     {row['speedup']:5.2f}x"
    if row["gb_s"] is not None:
        text += f" {row['gb_s']:8.0f}  {row['share_of_copy']:6.0%}"
    return f"{text}  {row['note'] or ''}".rstrip()
