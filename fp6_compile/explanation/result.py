"""What `explain` found, as data. How it looks is in text.py, page.py and terminal.py."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from fp6_compile.explanation.traffic import Traffic

# What is assumed, because no datasheet says it; benchmarks/linear/simulate.py assumes the same of a GPU.
SHARE_OF_BANDWIDTH = 0.9
MICROSECONDS_PER_LAUNCH = {"in a CUDA graph": 2.0, "from the host": 6.0, "on a CPU": 0.0}


@dataclass(frozen=True)
class Linear:
    """One weight that a matmul reads. `shape` is [N, K]; `format` and `sqnr` (dB) are None where there is none to tell.

    `reason` says why it was left alone, `note` what else there is to know. Bytes are what one matmul reads, scales included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    reason: str | None
    note: str | None

    @property
    def quantized(self) -> bool:
        """Whether it runs in six bits."""
        return self.reason is None

    @property
    def sqnr_text(self) -> str:
        """In dB, for people."""
        if not self.quantized:
            return ""
        return "unknown" if self.sqnr is None else f"{self.sqnr:.1f} dB"


@dataclass(frozen=True)
class Break:
    """A line where Dynamo ends a graph and begins another: file, number, text, and Dynamo's reason."""

    file: str
    line: int
    source: str
    reason: str


@dataclass(frozen=True)
class CudaGraphs:
    """`hold`: whether CUDA graphs record the whole call, or None: not known. `asked`: whether `mode` asks for them."""

    hold: bool | None
    asked: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one call. Predicted, not measured: bytes / (gb_per_s * share) + launches * launch_us.

    `ms_16bit` is the same sum with the bytes of the weights before. None where the bandwidth is not known.
    """

    ms: float | None
    ms_16bit: float | None
    gb_per_s: float | None
    share: float
    launch_us: float
    launched: str
    source: str


@dataclass(frozen=True)
class Explanation:
    """What `torch.compile(model, backend="fp6")` makes of a call, told without running it.

    `launches` are the kernels of one call, in order; None if no code could be generated, and `unknown` says why.
    `traffic` are the bytes that one call reads; `stopped` says where tracing ended early; `note`, what else to know.
    """

    model: str
    device: str
    options: str
    linears: tuple[Linear, ...]
    graphs: int
    breaks: tuple[Break, ...]
    cuda_graphs: CudaGraphs
    launches: tuple[str, ...] | None
    traffic: Traffic
    prediction: Prediction
    unknown: str | None = None
    stopped: str | None = None
    note: str | None = None

    @property
    def quantized(self) -> list[Linear]:
        """The linears that run in six bits."""
        return [linear for linear in self.linears if linear.quantized]

    @property
    def saved(self) -> int:
        """Bytes that a call reads less than with 16-bit weights."""
        return sum(linear.bytes_before - linear.bytes_after for linear in self.linears)

    @property
    def kinds(self) -> dict[str, int]:
        """How often each kind of kernel is launched, by `kind`."""
        return dict(Counter(map(kind, self.launches or ())))

    def text(self) -> str:
        """For a terminal without colours; as str()."""
        from fp6_compile.explanation.show.text import text

        return text(self)

    def json(self) -> str:
        """All of it, as one JSON object; infinite SQNR is null."""
        data: dict[str, Any] = {**asdict(self), "predicted_not_measured": True, "kernels": self.kinds}
        for linear in data["linears"]:
            linear["sqnr"] = linear["sqnr"] if math.isfinite(linear["sqnr"] or 0) else None
        return json.dumps(data, indent=1)

    def html(self) -> str:
        """One page that needs no other file and no network."""
        from fp6_compile.explanation.show.page import page

        return page(self)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        from fp6_compile.explanation.show.page import page

        return page(self, whole=False)

    def __rich__(self) -> Any:
        from fp6_compile.explanation.show.terminal import renderable

        return renderable(self)


def kind(launch: str) -> str:
    """What a launch is, for people: "template matmul", "generated", "attention", "copy", or the operator's name."""
    if launch.startswith("triton_tem_"):
        return "template matmul"
    if launch.startswith(("triton_", "cpp_")):
        return "generated"
    if "scaled_dot_product" in launch:
        return "attention"
    if launch.endswith(".copy_"):
        return "copy"
    return launch.removeprefix("extern_kernels.").removeprefix("torch.ops.").removesuffix(".default")
