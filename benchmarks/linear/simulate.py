"""Times predicted without a GPU, from the kernel's machine code and the bytes it moves. A model, never a measurement.

The time of a launch is a constant plus the largest of:

    dram    the problem's bytes, at the memory's rate; where programs are few, at the rate that loads in flight sustain
    l2      what every program reads: weights, and x again for each tile of rows, as if no first-level cache had it;
            the parts of a split K, written and read
    issue   instructions of the hot loop, 4 a clock on the busiest multiprocessor
    alu     those of its integer pipe, 2 a clock
    tensor  multiplications, padded to tiles, at the rate of the matrix instruction that the code has

With fewer than four warps a multiprocessor, the last three have as many of its four schedulers. F.linear is predicted as
its roofline plus the same constant, which no library reaches: ratios err to its side. Not modelled: the prologue, latency
between dependent instructions, bank conflicts, clocks that fall under load. Device constants are from datasheets; the shares
of them that are assumed to be reached are in ASSUMED.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.linear.bench import Problem, compare
from benchmarks.linear.results import Row
from benchmarks.sass.cases import DTYPES, Case, Kernel, compile_case, tile_of
from benchmarks.system import environment
from fp6_compile.layouts.gpu_tiles import BLOCK_K, ROWS

BITS = 6


@dataclass(frozen=True)
class GPU:
    """Datasheet figures: clock is the highest, tensor is dense FP16 with FP32 sums, mma_sync the share that mma.sync has."""

    name: str
    multiprocessors: int
    clock_ghz: float
    dram_tb_s: float
    tensor_tflop_s: float
    mma_sync: float
    shared_kb: int  # of a multiprocessor, for programs
    source: str


GPUS = {
    "sm_80": GPU("A100 SXM 80GB", 108, 1.41, 2.04, 312, 1.0, 164, "NVIDIA A100 datasheet"),
    "sm_89": GPU("RTX 4090", 128, 2.52, 1.01, 165, 1.0, 100, "NVIDIA Ada architecture whitepaper"),
    "sm_90": GPU(
        "H200 SXM", 132, 1.98, 4.8, 989, 0.62, 228, "NVIDIA H200 datasheet; mma.sync's share: arXiv 2402.13499"
    ),
    "sm_100": GPU("B200 SXM", 148, 1.85, 8.0, 2250, 0.5, 228, "NVIDIA Blackwell datasheet; mma.sync's share: a guess"),
    "sm_120": GPU("RTX 5090", 170, 2.41, 1.79, 210, 1.0, 100, "NVIDIA RTX Blackwell whitepaper"),
}


@dataclass(frozen=True)
class Assumed:
    """Assumptions of the model that are not in a datasheet."""

    launch_us: float = 2.0  # of a kernel in a graph: launch, ramp and tail
    dram_share: float = 0.9  # of the datasheet's bandwidth that a kernel can reach
    tensor_share: float = 0.8  # of the datasheet's products
    l2_over_dram: float = 1.5  # what multiprocessors read from the L2 cache, over what that reads from memory
    latency_us: float = 0.7  # of a load from memory under load


ASSUMED = Assumed()


def times_fp6(
    gpu: GPU, kernel: Kernel, m: int, n: int, k: int, groups: int, itemsize: int, assumed: Assumed
) -> dict[str, float]:
    """Microseconds of each term, for x [m, k] and a weight [n, k] with `groups` scales a row."""
    tile, loop = kernel.tile, kernel.code.hot_loop
    tiles_n, tiles_m, parts = math.ceil(n / tile.BLOCK_N), math.ceil(m / tile.BLOCK_M), tile.SPLIT_K
    blocks, programs = math.ceil(k / BLOCK_K / parts), tiles_n * tiles_m * parts
    busiest = math.ceil(programs / gpu.multiprocessors)
    clock = gpu.clock_ghz * 1e3 * min(1.0, busiest * tile.num_warps / 4)  # clocks a microsecond, of all four schedulers
    iterations = busiest * blocks * tile.num_warps
    weights = weight_bytes(n, k, groups)
    resident = min(programs, gpu.multiprocessors * _occupancy(gpu, kernel))
    in_flight = resident * (tile.num_stages - 1) * tile.BLOCK_N * BLOCK_K * BITS / 8
    dram = min(gpu.dram_tb_s * assumed.dram_share * 1e6, in_flight / assumed.latency_us)  # bytes a microsecond
    kind = gpu.mma_sync if kernel.code.mma == "HMMA" else 1.0
    tensor = gpu.tensor_tflop_s * 1e6 * assumed.tensor_share * kind / gpu.multiprocessors
    products = 2 * busiest * tile.BLOCK_N * tile.BLOCK_M * blocks * BLOCK_K
    return {
        "dram": (weights + (m * k + m * n) * itemsize) / dram,
        "l2": (tiles_m * weights + tiles_n * m * k * itemsize + (8 * parts * m * n if parts > 1 else 0))
        / (gpu.dram_tb_s * assumed.dram_share * assumed.l2_over_dram * 1e6),
        "issue": iterations * len(loop) / (4 * clock),
        "alu": iterations * loop.pipes()["ALU"] / (2 * clock),
        "tensor": products / (tensor * min(1.0, busiest * tile.num_warps / 4)),
    }


def times_linear(gpu: GPU, m: int, n: int, k: int, itemsize: int, assumed: Assumed) -> dict[str, float]:
    """Microseconds of each term, of a matmul that reaches the roofline."""
    return {
        "dram": (n * k + m * k + m * n) * itemsize / (gpu.dram_tb_s * assumed.dram_share * 1e6),
        "tensor": 2 * m * n * k / (gpu.tensor_tflop_s * assumed.tensor_share * 1e6),
    }


def times_cublas(gpu: GPU, m: int, n: int, k: int, groups: int, itemsize: int, assumed: Assumed) -> dict[str, float]:
    """Microseconds of each term, where the weight is dequantized into memory, by a launch of its own, for that matmul."""
    copied = (weight_bytes(n, k, groups) + n * k * itemsize) / (gpu.dram_tb_s * assumed.dram_share * 1e6)
    linear = times_linear(gpu, m, n, k, itemsize, assumed)
    return {term: us + copied + assumed.launch_us for term, us in linear.items()}


def _occupancy(gpu: GPU, kernel: Kernel) -> int:
    """Programs that fit a multiprocessor: shared memory (1 KB is the system's), registers, 32 at most."""
    registers = math.ceil(kernel.code.registers / 8) * 8 * 32 * kernel.tile.num_warps
    return max(1, min((gpu.shared_kb << 10) // (kernel.code.shared_bytes + 1024), 65536 // registers, 32))


def weight_bytes(n: int, k: int, groups: int) -> int:
    """Of a packed weight [n, k] and its scales."""
    return math.ceil(n / ROWS) * ROWS * math.ceil(k / BLOCK_K) * BLOCK_K * BITS // 8 + 4 * n * groups


def predict(problem: Problem, m: int, target: str, assumed: Assumed = ASSUMED) -> Iterator[Row]:
    """The rows of F.linear and of this package for x of `m` rows. The note says which term is the largest."""
    gpu, itemsize, (_, n, k, _) = GPUS[target], DTYPES[problem.dtype].itemsize, problem.shape
    groups = math.ceil(k / problem.group_size) if problem.group_size else 1
    case = Case(target, m, n, problem.format, problem.dtype, problem.group_size, k)
    if tile_of(case) is None:
        ours = times_cublas(gpu, m, n, k, groups, itemsize, assumed)
    else:
        ours = times_fp6(gpu, compile_case(case), m, n, k, groups, itemsize, assumed)
    theirs = times_linear(gpu, m, n, k, itemsize, assumed)
    rows: list[Row] = []
    for provider, times in (("linear", theirs), ("fp6", ours)):
        nbytes = weight_bytes(n, k, groups) if provider == "fp6" else n * k * itemsize
        row = problem.row("predicted", provider, "model", m) | _figures(times, m, n, k, nbytes, itemsize, assumed)
        compare(row, rows, gpu.dram_tb_s * assumed.dram_share * 1e3)
        rows.append(row)
    yield from rows


def _figures(times: dict[str, float], m: int, n: int, k: int, nbytes: int, itemsize: int, assumed: Assumed) -> Row:
    limit = max(times, key=lambda term: times[term])
    us, moved = assumed.launch_us + times[limit], nbytes + (m * k + m * n) * itemsize
    return {
        **{"us_p50": round(us, 3), "weight_bytes": nbytes, "bytes": moved, "gb_s": round(moved / us / 1e3, 2)},
        **{"tflop_s": round(2 * m * n * k / us / 1e6, 4), "note": f"predicted, limited by {limit}"},
    }


def about(target: str) -> dict[str, object]:
    """What a file of predictions says about them."""
    gpu = GPUS[target]
    return {
        **{"kind": "predicted", "device": f"{gpu.name} ({target}), predicted", "constants": asdict(gpu)},
        **{"assumed": asdict(ASSUMED), **environment.versions()},
        "copy_gb_s": round(gpu.dram_tb_s * ASSUMED.dram_share * 1e3),
        **{f"matmul_{dtype}_tflop_s": round(gpu.tensor_tflop_s * ASSUMED.tensor_share) for dtype in ("fp16", "bf16")},
    }
