"""From a weight to codes and scales: round to nearest, per output channel or per group of inputs.

A weight [N, K] is cut along K into G = ceil(K / group_size) groups (one, the whole row, when group_size is None: the coarse
scale of ZeroQuant(4+2)). Every group has one FP32 scale s, and stores the code nearest to w / s. FP32 because an FP16 scale
overflows once the kernel's power of two is folded in, and four bytes a row cost nothing.

Scales are [G, N], not [N, G]: the kernel's lanes walk along N and read neighbouring scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fp6_compile._compat.torch import is_fake
from fp6_compile.formats import Format

SCALES = ("absmax", "mse")

# Multiples of the absmax scale that "mse" tries; the first is absmax itself. Below 1 the largest weights are clipped; above
# 1 the largest codes stay unused, and all weights move along the format's binades, which gains as much (docs/log.md).
RATIOS = (1.0, *(0.7 + 0.03 * i for i in range(21) if i != 10))
# Weights are quantized this many at a time. On a CPU: what stays in a core's second-level cache, and what torch does not
# split among threads (at::internal::GRAIN_SIZE), whose meeting after every operation takes longer on a busy machine than the
# work. Elsewhere: what keeps temporaries small beside a layer.
_BLOCK = {"cpu": 1 << 15}
_LARGE_BLOCK = 1 << 24


class Grid(Protocol):
    """The numbers that codes stand for: a Format, or integers and others that formats are compared with."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def bits(self) -> int:
        """Bits of a code, at most 8."""

    @property
    def max(self) -> float:
        """The largest number; what is above saturates."""

    def encode(self, values: Tensor) -> Tensor:
        """Codes (uint8) of finite float32 numbers, any shape."""

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 numbers that codes stand for."""

    def round(self, values: Tensor) -> Tensor:
        """decode(encode(values)), in a new tensor."""


def quantize(
    weight: Tensor,
    fmt: Grid,
    group_size: int | None = None,
    scale: str = "absmax",
    importance: Tensor | None = None,
    ratios: Sequence[float] = RATIOS,
) -> tuple[Tensor, Tensor]:
    """Nearest codes and scales of `weight`.

    Args:
        weight: [N, K], float16, bfloat16, float32 or float64, any strides; finite.
        fmt: the format of the codes.
        group_size: inputs that share a scale; any positive number (the last group may be short), or None for the row.
        scale: "absmax" (largest magnitude lands on `fmt.max`) or "mse" (of some multiples of that scale, the one with the
            least squared error in each group).
        importance: for "mse": how much the squared error of each input's weights counts, [K], or of each pair of inputs'
            weights in a group, [K, K] (e H e^T instead of the sum of h_k e_k^2); None: all the same.
        ratios: for "mse": the multiples; the first wins where several are as good.

    Returns:
        codes [N, K] uint8 and scale [G, N] float32. A group of zeros gets scale 1.

    Raises:
        ValueError: weight is not a floating-point matrix or has NaN or infinite values; unknown `scale`; bad group_size.
    """
    check(weight, group_size, scale)
    n, k = weight.shape
    size = group_size or max(k, 1)
    groups = -(-k // size) if group_size else 1
    codes = weight.new_empty(n, k, dtype=torch.uint8)
    scales = weight.new_empty(groups, n, dtype=torch.float32)
    counts = None if importance is None else _importance(importance.float(), groups, size)
    for rows in row_blocks(n, k, weight.device):
        w = _grouped(weight[rows].float(), groups, size)
        s = _absmax_scale(w, fmt) if scale == "absmax" else _mse_scale(w, fmt, counts, ratios)
        codes[rows] = fmt.encode(w / s).flatten(1)[:, :k]
        scales[:, rows] = s[..., 0].T
    if has_values(weight) and not scales.isfinite().all():  # a group with NaN or an infinity has such a scale
        check_finite(weight)
    return codes, scales


def dequantize(codes: Tensor, scale: Tensor, fmt: Grid, group_size: int | None, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype` that codes [N, K] and scale [G, N] stand for: float32 products, rounded once."""
    k = codes.shape[1]
    per_weight = scale.T if scale.shape[0] <= 1 else scale.T.repeat_interleave(group_size or k, 1)[:, :k]
    return (fmt.decode(codes) * per_weight).to(dtype)


def squared_error(weight: Tensor, fmt: Grid, group_size: int | None, scale: str) -> float:
    """The sum of the squares of what `weight` [N, K] differs by from its codes' values. Raises as `quantize` does."""
    n, k = weight.shape
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for rows in row_blocks(n, k, weight.device):
        exact = weight[rows].float()
        codes, scales = quantize(exact, fmt, group_size, scale)
        total += (dequantize(codes, scales, fmt, group_size, torch.float32) - exact).square_().sum(dtype=torch.float64)
    return float(total)


def sqnr(weight: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise in dB, 10 log10(sum w^2 / sum (w - approximation)^2), of two tensors of one shape.

    In float64; infinite where nothing is lost.
    """
    signal = noise = 0.0
    pairs = zip(weight.flatten().split(_LARGE_BLOCK), approximation.flatten().split(_LARGE_BLOCK), strict=True)
    for exact, rounded in pairs:
        exact = exact.double()
        signal += float(exact.square().sum())
        noise += float((exact - rounded).square_().sum())
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def choose_format(
    weights: Sequence[Tensor], formats: Sequence[Format], group_size: int | None = None, scale: str = "absmax"
) -> Format:
    """The one of `formats` with the least squared error over all of `weights` [N, K] together; of equals the first.

    ValueError for weights without values.
    """
    if not all(map(has_values, weights)):
        raise ValueError(
            'format: "auto" chooses by the values of weights, which tensors on the meta device and fake ones do not have: '
            f"name one of {[fmt.name for fmt in formats]}"
        )
    return min(formats, key=lambda fmt: sum(squared_error(weight, fmt, group_size, scale) for weight in weights))


def check(weight: Tensor, group_size: int | None, scale: str) -> None:
    """ValueError for what cannot be quantized, whatever its values are."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: got {weight.dtype} of shape {list(weight.shape)}, needs a floating-point matrix [N, K]"
        )
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size: got {group_size}, needs a positive number or None")
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, known scales are {list(SCALES)}")


def has_values(tensor: Tensor) -> bool:
    """Whether there is more to it than shape and dtype: not so on the meta device, and for fake tensors."""
    return not (tensor.is_meta or is_fake(tensor))


def check_finite(weight: Tensor) -> None:
    """ValueError, which counts them, for a weight with NaN or infinite values."""
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(f"weight: {bad} of {weight.numel()} values are NaN or infinite")


def row_blocks(n: int, k: int, device: torch.device, granularity: int = 1) -> Iterator[slice]:
    """Slices of rows of a weight [n, k], each a multiple of `granularity` but the last, small enough to work on at once."""
    block = _BLOCK.get(device.type, _LARGE_BLOCK)
    rows = max(1, block // max(k, 1) // granularity) * granularity
    return (slice(i, min(i + rows, n)) for i in range(0, max(n, 1), rows))


def _grouped(values: Tensor, groups: int, size: int) -> Tensor:
    """[..., K] as [..., groups, size], filled up with zeros."""
    return F.pad(values, (0, groups * size - values.shape[-1])).unflatten(-1, (groups, size))


def _absmax_scale(w: Tensor, fmt: Grid) -> Tensor:
    """[rows, G, 1] from w [rows, G, size]; the clamp keeps every scale a normal number."""
    amax = w.abs().amax(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    return (amax / fmt.max).clamp_(min=tiny).masked_fill_(amax == 0, 1.0)


def _mse_scale(w: Tensor, fmt: Grid, importance: Tensor | None, ratios: Sequence[float]) -> Tensor:
    """As `_absmax_scale`; importance as from `_importance`."""
    absmax = _absmax_scale(w, fmt)
    best, least = absmax, torch.full_like(absmax, torch.inf)
    for ratio in ratios:
        s = absmax * ratio
        error = _norm(fmt.round(w / s).mul_(s).sub_(w), importance)
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    return best


def _importance(importance: Tensor, groups: int, size: int) -> Tensor:
    """[K] as [G, size]; [K, K] as its blocks on the diagonal, [G, size, size]."""
    if importance.dim() == 1:
        return _grouped(importance, groups, size)
    rows = _grouped(_grouped(importance, groups, size).flatten(1).T, groups, size)  # [G size, G, size]
    return rows.unflatten(0, (groups, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _norm(error: Tensor, importance: Tensor | None) -> Tensor:
    """[rows, G, 1]: squared errors of [rows, G, size], which may be overwritten, as much as they count."""
    if importance is not None and importance.dim() == 3:
        return (torch.einsum("rgi,gij->rgj", error, importance) * error).sum(-1, keepdim=True)
    error = error.square_()
    return (error if importance is None else error.mul_(importance)).sum(-1, keepdim=True)
