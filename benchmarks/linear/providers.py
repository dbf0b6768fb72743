"""Who multiplies: this package, cuBLAS through F.linear, and other packages that are installed.

A provider turns a weight [N, K] into a module that maps x [M, K] to [M, N]. All get the same random weight. A module's
parameters and buffers are its weight: the ring is copies of the module, and a call reads as many bytes as they have.

The modules of other packages follow their documentation and have not been run here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp6_compile.ops  # noqa: F401  torch.ops.fp6
from fp6_compile.formats import get_format
from fp6_compile.layouts.packing import layout_for, pack, plane_names, rows_per_index
from fp6_compile.quantize import quantize


@dataclass(frozen=True)
class Spec:
    """The dtype of activations, and the format of weights."""

    dtype: torch.dtype
    format: str = "e3m2"
    group_size: int | None = None


class SixBit(nn.Module):
    """This package's kernel: `kernels.launch.mm` on a GPU; the CPU operator in a dry run."""

    scale: Tensor

    def __init__(self, weight: Tensor, spec: Spec) -> None:
        super().__init__()
        self.fmt, self.group_size = get_format(spec.format), spec.group_size
        self.layout = layout_for(weight.device, spec.dtype, self.fmt)
        codes, scale = quantize(weight, self.fmt, spec.group_size)
        step = (1 << 24) // weight.shape[1] // 16 * 16 or 16  # rows packed at a time: packing needs int32 temporaries
        blocks = [pack(rows, self.fmt, self.layout) for rows in codes.split(step)]
        for name, parts in zip(plane_names(self.fmt), zip(*blocks, strict=True), strict=True):
            self.register_buffer(name, torch.cat(parts))
        self.register_buffer("scale", scale)

    @property
    def planes(self) -> list[Tensor]:
        """In the order of packing.pack."""
        return [getattr(self, name) for name in plane_names(self.fmt)]

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T."""
        if x.is_cuda:
            from fp6_compile.kernels.selection import launch

            return launch.mm(x, self.planes, self.scale, self.fmt, self.group_size)
        out: Tensor = torch.ops.fp6.mm(x, self.planes, self.scale, self.fmt.name, self.layout, self.group_size)
        return out

    def error(self, x: Tensor, y: Tensor) -> float:
        """|y - exact| / |exact| over the last rows of the weight, exact in float32; NaN anywhere in y makes it NaN."""
        per_index = rows_per_index(self.layout)
        first = max(0, self.planes[0].shape[0] - 512 // per_index)
        rows = slice(first * per_index, None)
        weight = torch.ops.fp6.dequantize(
            *([plane[first:] for plane in self.planes], self.scale[:, rows]),
            *(self.fmt.name, self.layout, self.group_size, x.shape[1], torch.float32),
        )
        exact = F.linear(x.float(), weight)
        nan = (y.float() * 0).sum()  # NaN and infinities pass through
        return float((y[:, rows].float() - exact).norm() / exact.norm() + nan)


def fp6(weight: Tensor, spec: Spec) -> nn.Module:
    """Six bits, by this package."""
    return SixBit(weight, spec)


def linear(weight: Tensor, spec: Spec) -> nn.Module:
    """Sixteen bits, by ATen's library."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=spec.dtype)
    module.weight = nn.Parameter(weight.to(spec.dtype), requires_grad=False)
    return module


def torchao_int4(weight: Tensor, spec: Spec) -> nn.Module:
    """torchao's four-bit weights in tiles, groups of 128; BF16 activations."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    module = linear(weight, spec)
    quantize_(module, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return module


def gemlite_int4(weight: Tensor, spec: Spec) -> nn.Module:
    """GemLite's four-bit weights, groups of 128, rounded to nearest."""
    from gemlite.core import DType, GemLiteLinear

    groups = weight.float().unflatten(1, (-1, 128)).flatten(0, 1)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = (high - low) / 15
    zeros = -low / scales
    codes = (groups / scales + zeros).round().clamp(0, 15).to(torch.uint8).view(weight.shape)
    n, k = weight.shape
    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[spec.dtype]
    module: nn.Module = GemLiteLinear(
        4, group_size=128, in_features=k, out_features=n, input_dtype=kind, output_dtype=kind
    )
    module.pack(codes, scales.to(spec.dtype), zeros.to(spec.dtype), None)  # type: ignore[operator]
    return module


def humming(weight: Tensor, spec: Spec) -> nn.Module:
    """Humming's six-bit floats, in the same format as ours (a scale for each output, or for each group of inputs)."""
    from humming.layer import HummingLayer

    n, k = weight.shape
    config = {"dtype": f"float6{spec.format}", "group_size": spec.group_size or 0}
    module = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=spec.dtype)
    module = module.to(weight.device)
    module.load_from_unquantized(weight.to(spec.dtype))
    module.transform()
    return module


Provider = Callable[[Tensor, Spec], nn.Module]
# In the order of measuring; the first is what the others are compared with.
PROVIDERS: dict[str, Provider] = {
    "linear": linear,
    "fp6": fp6,
    "torchao-int4": torchao_int4,
    "gemlite-int4": gemlite_int4,
    "humming": humming,
}
_PACKAGES = {"torchao-int4": "torchao", "gemlite-int4": "gemlite", "humming": "humming"}


def missing(name: str) -> str | None:
    """The package that provider `name` needs and that is not installed, or None."""
    package = _PACKAGES.get(name)
    return package if package and importlib.util.find_spec(package) is None else None


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers; of a tensor subclass, those of the tensors inside it."""
    return sum(map(_bytes, _tensors(module)))


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        inner, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in inner)
    return tensor.nbytes
