"""What `explain` finds, as data. show/ has how it looks, and explanation.py both together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

# Assumptions of the prediction that no datasheet has; benchmarks/linear/simulate.py has the same for a GPU.
SHARE_OF_BANDWIDTH = 0.9
MICROSECONDS_PER_LAUNCH = {"in a CUDA graph": 2.0, "from the host": 6.0, "on a CPU": 0.0}


@dataclass
class Traffic:
    """Bytes read: of packed weights, of other parameters and buffers, and of what the caller passes (tokens, KV cache)."""

    packed: int = 0
    others: int = 0
    inputs: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.packed + self.others + self.inputs

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.packed + other.packed, self.others + other.others, self.inputs + other.inputs)


@dataclass(frozen=True)
class Linear:
    """One weight that a matmul reads. `shape` is [N, K]. `reason` says why it is skipped; None if it is quantized.

    `format` is None for one that is skipped, `sqnr` (dB) also where the values are not known. `note` is what else there is
    to know. Bytes are what one matmul reads, scales included.
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
        """Whether it is quantized."""
        return self.reason is None

    @property
    def sqnr_text(self) -> str:
        """The SQNR with its unit, "unknown", or "" for a linear that is skipped."""
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
    """`hold`: whether CUDA graphs record the whole call; None if unknown. `asked`: whether `mode` asks for them."""

    hold: bool | None
    asked: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one call. Predicted, not measured: bytes / (gb_per_s * share) + launches * launch_us.

    `ms_16bit` is the same with 16-bit weights. Both are None where the bandwidth is not known. `launched` says how: in a
    CUDA graph, from the host, or on a CPU. `source` says where `gb_per_s`, the bandwidth, is from.
    """

    ms: float | None
    ms_16bit: float | None
    gb_per_s: float | None
    share: float
    launch_us: float
    launched: str
    source: str


@dataclass(frozen=True)
class Result:
    """What `torch.compile(model, backend="fp6")` would do with a call.

    `launches` are the kernels of one call, in order; None if no code could be generated, and `unknown` says why.
    `traffic` has the bytes that one call reads; `stopped` says where tracing ended early; `note`, what else to know.
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
        """The linears that are quantized."""
        return [linear for linear in self.linears if linear.quantized]

    @property
    def saved(self) -> int:
        """How many bytes fewer a call reads than with 16-bit weights."""
        return sum(linear.bytes_before - linear.bytes_after for linear in self.linears)

    @property
    def kinds(self) -> dict[str, int]:
        """How often each kind of kernel is launched, by `kind`."""
        return dict(Counter(map(kind, self.launches or ())))


def kind(launch: str) -> str:
    """The kind of a launch: "template matmul", "generated", "attention", "copy", or the operator's name."""
    if launch.startswith("triton_tem_"):
        return "template matmul"
    if launch.startswith(("triton_", "cpp_")):
        return "generated"
    if "scaled_dot_product" in launch:
        return "attention"
    if launch.endswith(".copy_"):
        return "copy"
    return launch.removeprefix("extern_kernels.").removeprefix("torch.ops.").removesuffix(".default")
