"""Which linears were quantized, which were skipped and why: for people, for logging and for tests.

One `Report` per compiled graph. A model with graph breaks has several, and a new input shape may compile one more;
`reports()` has the newest thousand since the last torch._dynamo.reset(), `last_report()` the newest.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

log = logging.getLogger("fp6_compile")
Item = TypeVar("Item")


def _renamed(old: str, new: str, value: Item) -> Item:
    warnings.warn(f"fp6: {old} is called {new} now", DeprecationWarning, stacklevel=3)
    return value


@dataclass(frozen=True)
class LinearReport:
    """One weight that matmuls of the graph read.

    `shape` is [N, K], outputs by inputs. `reason` says why it was skipped, and is None when it was quantized; `note` is what
    else there is to know of a quantized one, and `format` is its format. Bytes are what a matmul reads, scales included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes_before: int
    bytes_after: int
    reason: str | None = None
    note: str | None = None
    format: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether the linear runs in packed bits."""
        return self.reason is None

    @property
    def taken(self) -> bool:
        """Deprecated: `quantized`."""
        return _renamed("LinearReport.taken", "quantized", self.quantized)


@dataclass(frozen=True)
class Report:
    """The linears of one compiled graph."""

    linears: tuple[LinearReport, ...]
    format: str

    @property
    def quantized(self) -> list[LinearReport]:
        """The linears that run in packed bits."""
        return [linear for linear in self.linears if linear.quantized]

    @property
    def skipped(self) -> list[LinearReport]:
        """The linears that stayed as they were."""
        return [linear for linear in self.linears if not linear.quantized]

    @property
    def taken(self) -> list[LinearReport]:
        """Deprecated: `quantized`."""
        return _renamed("Report.taken", "quantized", self.quantized)

    @property
    def refused(self) -> list[LinearReport]:
        """Deprecated: `skipped`."""
        return _renamed("Report.refused", "skipped", self.skipped)

    @property
    def bytes_before(self) -> int:
        """Bytes of all the linears' weights as they were."""
        return sum(linear.bytes_before for linear in self.linears)

    @property
    def bytes_after(self) -> int:
        """Bytes of all the linears' weights as they are read now, those of skipped ones unchanged."""
        return sum(linear.bytes_after for linear in self.linears)

    def summary(self) -> str:
        """One line: how many were quantized, the commonest reason why others were not, bytes before and after."""
        line = f"fp6: {len(self.quantized)} of {len(self.linears)} linears in {self.format}"
        if self.format == "auto":
            formats = Counter(linear.format for linear in self.quantized)
            line += f" ({', '.join(f'{number} {name}' for name, number in sorted(formats.items(), key=str))})"
        reasons = Counter(linear.reason for linear in self.skipped)
        if reasons:
            reason, count = reasons.most_common(1)[0]
            line += f", {len(self.skipped)} skipped ({count}: {reason})"
        return f"{line}, weights {size_text(self.bytes_before)} -> {size_text(self.bytes_after)}"

    def __str__(self) -> str:
        width = max((len(linear.name) for linear in self.linears), default=0)
        lines = [self.summary()]
        for linear in self.linears:
            shape = "x".join(map(str, linear.shape))
            verdict = linear.reason or f"{size_text(linear.bytes_before)} -> {size_text(linear.bytes_after)}"
            if linear.quantized and self.format == "auto":
                verdict += f" {linear.format}"
            note = f" ({linear.note})" if linear.note else ""
            mark = "fp6 " if linear.quantized else "skip"
            lines.append(f"  {mark}  {linear.name:<{width}}  {shape:>13}  {verdict}{note}")
        return "\n".join(lines)


# A process that compiles for years keeps the newest.
_reports: deque[Report] = deque(maxlen=1000)


def reports() -> list[Report]:
    """The reports of all graphs compiled since the last torch._dynamo.reset(), or of the newest thousand, oldest first."""
    return list(_reports)


def last_report() -> Report | None:
    """The report of the newest graph; None if nothing has been compiled since the last torch._dynamo.reset()."""
    return _reports[-1] if _reports else None


def publish(report: Report) -> None:
    """Keep and log the report of a graph."""
    _reports.append(report)
    log_report(report)


def log_report(report: Report) -> None:
    """Log a report; as a warning when nothing was quantized, because then the user got nothing."""
    log.info("%s", report.summary())
    log.debug("%s", report)
    if report.linears and not report.quantized:
        log.warning("%s", report.summary())


@dataclass(frozen=True)
class Refresh:
    """The weights that one call found changed and quantized anew, by module, and how long each took, in seconds.

    Weights that are packed side by side share their time equally.
    """

    seconds: dict[str, float]

    def __str__(self) -> str:
        names = list(self.seconds)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"fp6: quantized anew {', '.join(names[:3])}{more} in {1e3 * sum(self.seconds.values()):.1f} ms"


_last_refresh: list[Refresh] = []


def last_refresh() -> Refresh | None:
    """What the newest call with changed weights did about them; None if there was none since torch._dynamo.reset()."""
    return _last_refresh[-1] if _last_refresh else None


def publish_refresh(refresh: Refresh) -> None:
    """Keep and log what was quantized anew for one call."""
    _last_refresh[:] = [refresh]
    log.info("%s", refresh)


def count(event: str) -> None:
    """Add one to torch._dynamo.utils.counters["fp6"][event]."""
    from fp6_compile._compat.dynamo import counters  # here, because it imports Triton and Inductor

    counters["fp6"][event] += 1


def progress(items: Sequence[Item], title: str) -> Iterable[Item]:
    """`items`, with a bar on the terminal where that takes more than two seconds and tqdm is installed."""
    if not sys.stderr.isatty():  # not even a disabled bar: it takes a lock that forked processes share
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, desc=title, delay=2, leave=False)
    return bar


def forget_reports() -> None:
    """Forget all reports."""
    _reports.clear()
    _last_refresh.clear()


def size_text(count: float) -> str:
    """A number of bytes, for people: 4.03 GB."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
